"""Carries plans out: bounded, prioritised, metered movement and hashing.

Knows: executors and budgets. Must not know: how a plan was decided.
"""
