"""Which blocks are where, and which are worth keeping. Pure.

Knows: policies, the view of a cluster built from events, matching of prefixes.
Must not know: clocks, sockets, threads, randomness; whoever owns a tier passes time and facts in.
"""
