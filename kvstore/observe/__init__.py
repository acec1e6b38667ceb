"""Metrics, traces and audit: what happened, in base units.

Knows: metric families and their labels. Must not know: why anything
happened, or any global registry.
"""
