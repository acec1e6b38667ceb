"""Commands: parse, put configuration together, call a room, print.

Knows: every room's config. Must not know: how anything works inside.
"""
