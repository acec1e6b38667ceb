"""Typed results of operations that may miss, and the reasons why a prefix ends."""

from enum import IntEnum


class Outcome(IntEnum):
    """What became of one block in a batched tier operation. No value means a lie."""

    HIT = 1
    """The bytes are there and verified (read), or will be found (write)."""
    MISS = 2
    """The tier does not hold the block."""
    LATE = 3
    """The waiter's deadline passed; the operation itself may still be draining."""
    CORRUPT = 4
    """Bytes were found and failed their sums; the copy is already gone."""
    REFUSED = 5
    """The tier will not do it now: full, over quota, or its breaker is open."""


class MissReason(IntEnum):
    """Why the cached prefix of a request ends where it does. Shown in every reply."""

    NONE = 0
    """Every full block of the prompt was cached."""
    ABSENT = 1
    """Nobody holds the next block."""
    COMPUTING = 2
    """Another session is computing the next block at this moment."""
    LATE = 3
    """The block was on its way and did not arrive by the deadline."""
    CORRUPT = 4
    """The block was found and failed its checksum."""
    REFUSED = 5
    """The tier refused: over quota, draining, or breaker open."""
    LAST_TOKENS = 6
    """At least one prompt token must be computed to have logits to sample from."""
    PARTIAL_BLOCK = 7
    """The rest is shorter than a block, and a partial block has no name."""
    DISABLED = 8
    """The request or the worker has the store turned off."""
    UNREACHABLE = 9
    """The cache node did not answer; the request went on without it."""
    CHEAPER = 10
    """Recomputing was predicted to be faster than loading."""
    QUOTA = 11
    """The share domain or the root holds all that it may, and none of that can go now."""
    OUTWEIGHED = 12
    """There was no room, and all that could go is worth more than what would have come."""


class SettleOutcome(IntEnum):
    """What became of one slot named in `Settle`."""

    DONE = 1
    """Committed, aborted or released as asked."""
    ALREADY = 2
    """The same settle was carried out before; nothing changed."""
    STALE = 3
    """The generation moved on: the slot is no longer the caller's. Nothing changed."""
    DUPLICATE = 4
    """Another session committed the same name first; the caller's slot was freed."""
    NOT_YOURS = 5
    """The slot is reserved by another session, or there is no such slot. Nothing changed."""
