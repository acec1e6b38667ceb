"""Replays traces through the very classes that run in production.

Knows: traces and virtual time. Must not know: sockets, processes, real clocks.
"""
