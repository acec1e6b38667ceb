"""Nouns and pure decisions: names, layout, slots, outcomes, limits, errors.

Knows: what a block is called, how big it is, which changes of state are legal.
Must not know: clocks, sockets, threads, randomness, the environment, or any other room.
"""
