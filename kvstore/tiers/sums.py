"""Sums of blocks: xxh3-128 of each share, and of those sums for the whole block.

Hashing by share lets a tensor-parallel rank verify its part of a block by itself once the share
sums travel with it; the block sum over the share sums is what a slot record and
an on-disk header hold.
"""

import xxhash

SUM_BYTES = 16


def share_sums(payload: memoryview, shares: int) -> bytes:
    """Return the concatenated xxh3-128 digests of each share: 16 * `shares` bytes."""
    assert shares > 0 and len(payload) % shares == 0, (len(payload), shares)
    step = len(payload) // shares
    digest = xxhash.xxh3_128_digest
    return b"".join(digest(payload[i * step : (i + 1) * step]) for i in range(shares))


def block_sum(payload: memoryview, shares: int) -> bytes:
    """Return the 16-byte sum of a block: xxh3-128 over its share sums."""
    return xxhash.xxh3_128_digest(share_sums(payload, shares))
