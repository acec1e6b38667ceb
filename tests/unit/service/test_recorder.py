"""Recordings in the node (`kvstore.service.recorder`): salted, bounded, counted."""

import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.errors import Refused
from kvstore.observe.metrics import NodeMetrics
from kvstore.service.recorder import MAX_RECORDINGS, Recorders, Recording

NAMES = [bytes([n]) * 32 for n in range(10)]


def test_equal_names_have_equal_ids_within_a_recording_and_nowhere_else() -> None:
    first, second = Recording(0.0, b"a" * 32), Recording(0.0, b"b" * 32)
    for recording in (first, second):
        recording.note(5.4, 0, NAMES[0] + NAMES[1])
        recording.note(9.0, 1, NAMES[1] + NAMES[2])
    one, two = first.take(100)
    assert one.blocks[1] == two.blocks[0]
    assert (one.elapsed_ms, two.elapsed_ms, two.first_block) == (5, 9, 1)
    other = second.take(100)[0]
    assert not set(one.blocks) & set(other.blocks)


def test_no_part_of_a_name_can_be_read_from_an_id() -> None:
    recording = Recording(0.0, b"salt" * 8)
    recording.note(0.0, 0, b"".join(NAMES))
    (access,) = recording.take(100)
    assert len(set(access.blocks)) == len(NAMES)
    packed = b"".join(NAMES)
    assert not any(block.to_bytes(8, "little") in packed for block in access.blocks)


def test_a_full_queue_drops_and_counts_and_recovers() -> None:
    recording = Recording(0.0, b"s", max_names=3)
    assert recording.note(0.0, 0, NAMES[0] + NAMES[1])
    assert not recording.note(1.0, 0, NAMES[2] + NAMES[3])
    assert recording.note(2.0, 0, NAMES[4])
    assert recording.dropped == 1
    assert [len(access.blocks) for access in recording.take(100)] == [2, 1]
    assert recording.note(3.0, 0, NAMES[0] + NAMES[1] + NAMES[2])


def test_a_message_takes_about_as_many_names_as_it_is_told() -> None:
    recording = Recording(0.0, b"s")
    for name in NAMES:
        recording.note(0.0, 0, name)
    assert [len(recording.take(4)) for _ in range(4)] == [4, 4, 2, 0]


def test_every_recording_hears_of_every_access_and_misses_are_a_metric() -> None:
    metrics = NodeMetrics(CollectorRegistry())
    recorders = Recorders(metrics, clock_ms=lambda: 7.0)
    recorders.note(0, NAMES[0])  # nobody records
    slow, fast = recorders.begin(), recorders.begin()
    slow.max_names = 0
    recorders.note(3, NAMES[0])
    recorders.note(0, b"")
    assert [access.first_block for access in fast.take(9)] == [3]
    assert (slow.take(9), slow.dropped) == ([], 1)
    assert metrics.unrecorded._value.get() == 1
    assert slow.salt != fast.salt and len(slow.salt) == 32
    recorders.end(slow)
    assert len(recorders) == 1


def test_recordings_are_bounded() -> None:
    recorders = Recorders(NodeMetrics(CollectorRegistry()))
    running = [recorders.begin() for _ in range(MAX_RECORDINGS)]
    with pytest.raises(Refused, match="recordings run already"):
        recorders.begin()
    recorders.end(running[0])
    recorders.begin()
