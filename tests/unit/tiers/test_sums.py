"""Sums of blocks: per share, order matters, every byte counts."""

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstore.tiers.sums import SUM_BYTES, block_sum, share_sums


def test_a_block_sum_is_the_sum_of_its_share_sums() -> None:
    payload = memoryview(bytes(range(12)))
    parts = [xxhash.xxh3_128_digest(bytes(payload[i : i + 4])) for i in (0, 4, 8)]
    assert share_sums(payload, 3) == b"".join(parts)
    assert block_sum(payload, 3) == xxhash.xxh3_128_digest(b"".join(parts))
    assert len(block_sum(payload, 1)) == SUM_BYTES


@given(st.binary(min_size=8, max_size=64), st.integers(0, 63), st.integers(1, 255))
def test_any_changed_byte_changes_the_sum(payload: bytes, at: int, change: int) -> None:
    payload = payload[: len(payload) // 4 * 4]
    spoilt = bytearray(payload)
    spoilt[at % len(payload)] ^= change
    assert block_sum(memoryview(payload), 4) != block_sum(memoryview(spoilt), 4)


def test_the_number_of_shares_is_part_of_the_sum() -> None:
    payload = memoryview(bytes(16))
    assert len({block_sum(payload, shares) for shares in (1, 2, 4)}) == 3


@pytest.mark.parametrize("shares", [0, -1, 3])
def test_shares_must_divide_the_payload(shares: int) -> None:
    with pytest.raises(AssertionError):
        share_sums(memoryview(bytes(16)), shares)
