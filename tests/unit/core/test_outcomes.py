"""Our enumerations and the wire's have the same numbers and names."""

from enum import IntEnum
from typing import Any

import pytest

from kvstore.core.outcomes import MissReason, Outcome, SettleOutcome
from kvstore.directory.events import TierKind
from kvstore.rpc.v1 import cache_pb2, types_pb2


@pytest.mark.parametrize(
    ("ours", "wire", "prefix"),
    [
        (Outcome, types_pb2.Outcome, "OUTCOME_"),
        (MissReason, types_pb2.MissReason, "MISS_REASON_"),
        (SettleOutcome, cache_pb2.SettleOutcome, "SETTLE_OUTCOME_"),
        (TierKind, types_pb2.Tier, "TIER_"),
    ],
)
def test_numbers_equal_the_wire(ours: type[IntEnum], wire: Any, prefix: str) -> None:
    on_wire = {name.removeprefix(prefix): number for name, number in wire.items()}
    on_wire.pop("UNSPECIFIED", None)
    assert {member.name: member.value for member in ours} == on_wire


def test_zero_is_never_a_success() -> None:
    """An empty reply decodes to zeros: it must not read as a hit or as done."""
    assert 0 not in set(Outcome)
    assert 0 not in set(SettleOutcome)
    assert MissReason(0) is MissReason.NONE
