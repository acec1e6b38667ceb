"""Fields of requests are checked before the store is asked."""

import pytest

from kvstore.core.errors import BadInput, TooLarge
from kvstore.core.limits import MAX_DEADLINE_MS, MAX_NAMES_PER_CALL
from kvstore.rpc.v1 import cache_pb2
from kvstore.service.requests import deadline, patience_s, refs, split


class Call:
    """As much of a gRPC context as is looked at."""

    def __init__(self, left_s: float | None = None) -> None:
        self.left_s = left_s

    def time_remaining(self) -> float | None:
        return self.left_s


def test_slots_and_generations_go_in_pairs() -> None:
    good = cache_pb2.SlotRefs(slots=[4, 5], generations=[1, 2])
    assert refs(good, "commit") == [(4, 1), (5, 2)]
    with pytest.raises(BadInput, match="commit has 2 slots and 1 generations"):
        refs(cache_pb2.SlotRefs(slots=[4, 5], generations=[1]), "commit")
    many = [1] * (MAX_NAMES_PER_CALL + 1)
    with pytest.raises(TooLarge, match="abort has"):
        refs(cache_pb2.SlotRefs(slots=many, generations=many), "abort")


def test_deadlines_have_a_bound() -> None:
    assert deadline(5) == 5
    with pytest.raises(BadInput, match="deadline_ms"):
        deadline(MAX_DEADLINE_MS + 1)


def test_a_look_at_blocks_leaves_time_for_the_answer() -> None:
    assert patience_s(Call(), 300) == 0.3  # type: ignore[arg-type]
    assert patience_s(Call(left_s=0.25), 300) == 0.125  # type: ignore[arg-type]


def test_names_are_cut_by_their_length() -> None:
    assert split(b"a" * 32 + b"b" * 32) == [b"a" * 32, b"b" * 32]
