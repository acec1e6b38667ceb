"""Answers are read whole or not at all."""

import pytest

from kvstore.client.config import ClientConfig
from kvstore.client.replies import (
    SlotRef,
    acquired_from,
    lookup_from,
    packed_names,
    settled_from,
    slot_refs,
    stats_from,
)
from kvstore.core.errors import BadInput, Unreachable
from kvstore.core.names import BlockName
from kvstore.core.outcomes import MissReason, SettleOutcome
from kvstore.directory.events import TierKind
from kvstore.rpc.v1 import cache_pb2, types_pb2


def reply() -> cache_pb2.AcquireReply:
    return cache_pb2.AcquireReply(
        incarnation=2,
        lease=77,
        lease_ms=30_000,
        ready=1,
        pending=1,
        slots=[4, 5],
        offsets=[10, 11],
        generations=[1, 2],
        tiers=[types_pb2.TIER_NVME],
        reserved_names=[2],
        reserved_slots=[6],
        reserved_offsets=[12],
        reserved_generations=[3],
        reason=types_pb2.MISS_REASON_ABSENT,
    )


def test_an_answer_is_cut_into_ready_pending_and_reserved() -> None:
    acquired = acquired_from(reply(), 1)
    assert acquired.ready == [SlotRef(4, 1, 40_960, TierKind.DRAM, 1)]
    assert acquired.pending == [SlotRef(5, 2, 45_056, TierKind.NVME, 1)]
    assert [item.index for item in acquired.reserved] == [2]
    assert acquired.reserved[0].slot == SlotRef(6, 3, 49_152, TierKind.DRAM, 1)
    assert (acquired.lease, acquired.lease_ms, acquired.incarnation) == (77, 30_000, 2)
    assert acquired.reason is MissReason.ABSENT
    assert acquired.reserve_reason is MissReason.NONE


@pytest.mark.parametrize(
    "field", ["slots", "offsets", "generations", "tiers", "reserved_names", "reserved_offsets"]
)
def test_lists_of_unequal_length_are_not_believed(field: str) -> None:
    broken = reply()
    del getattr(broken, field)[-1]
    with pytest.raises(Unreachable, match="malformed"):
        acquired_from(broken, 1)


def test_a_tier_of_a_later_version_is_not_believed() -> None:
    later = reply()
    del later.tiers[:]
    later.tiers.extend([2, 9])  # type: ignore[list-item]
    with pytest.raises(Unreachable, match="malformed"):
        acquired_from(later, 1)


def test_names_travel_packed() -> None:
    one, two = BlockName(b"a" * 32), BlockName(b"b" * 32)
    assert packed_names([one, two]) == one + two
    assert packed_names(one + two) == one + two
    with pytest.raises(BadInput):
        packed_names(["text"])  # type: ignore[list-item]


def test_slots_out_of_range_are_bad_input() -> None:
    good = SlotRef(1, 1, 0, TierKind.DRAM, 1)
    assert slot_refs([good]).slots == [1]
    for bad in (good._replace(slot=-1), good._replace(slot=1 << 32), good._replace(generation=-1)):
        with pytest.raises(BadInput):
            slot_refs([bad])


def test_settled_lookup_and_stats() -> None:
    settled = settled_from(
        cache_pb2.SettleReply(
            commit=[cache_pb2.SETTLE_OUTCOME_DONE, cache_pb2.SETTLE_OUTCOME_DUPLICATE],
            release=[cache_pb2.SETTLE_OUTCOME_ALREADY],
        )
    )
    assert settled.commit == [SettleOutcome.DONE, SettleOutcome.DUPLICATE]
    assert settled.abort == []
    assert settled.release == [SettleOutcome.ALREADY]
    found = lookup_from(cache_pb2.LookupReply(prefix=1, tiers=bytes([0b100, 0, 0b1100])))
    assert found.tiers == [{TierKind.DRAM}, frozenset(), {TierKind.DRAM, TierKind.NVME}]
    message = cache_pb2.StatsReply(node="n", slots={"SEALED": 3}, reserved_bytes=5)
    message.tiers.add(tier=types_pb2.TIER_DRAM, used_bytes=9, hits=1)
    stats = stats_from(message)
    assert stats.tiers[TierKind.DRAM].used_bytes == 9
    assert (stats.slots, stats.reserved_bytes) == ({"SEALED": 3}, 5)


@pytest.mark.parametrize("field", ["call_ms", "connect_ms", "sweep_ms"])
@pytest.mark.parametrize("value", [0, -1, 600_001])
def test_absurd_deadlines_are_refused(field: str, value: int) -> None:
    with pytest.raises(BadInput, match=field):
        ClientConfig(**{field: value})
