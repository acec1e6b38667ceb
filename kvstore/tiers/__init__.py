"""Bytes at rest: the arena (DRAM), and further tiers beside it. Strangers to each other.

Knows: allocation, sums, one medium each. Must not know: another tier, RPCs, policies' reasons.
"""
