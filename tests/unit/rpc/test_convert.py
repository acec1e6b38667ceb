"""Wire messages and our nouns: everything survives the way there and back, nothing bad gets in."""

import math
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.errors import BadInput, TooLarge
from kvstore.core.limits import MAX_ID_BYTES, MAX_NAMES_PER_CALL
from kvstore.core.names import BlockName, Fidelity, Namespace, NamespaceKind, Root
from kvstore.directory.events import (
    Began,
    Changed,
    Digest,
    Ended,
    Event,
    Loaded,
    LoadRate,
    Lost,
    Marked,
    TierKind,
    WorkerRole,
)
from kvstore.rpc.convert import (
    MAX_NAMESPACE_TEXT,
    check_id,
    check_names,
    event_from_reply,
    event_to_reply,
    namespace_from_proto,
    namespace_to_proto,
    root_from_wire,
    tier_from_wire,
)
from kvstore.rpc.v1 import types_pb2, watch_pb2

ROOT = Root(b"r" * 32)
NAMES = [BlockName(bytes([n]) * 32) for n in range(3)]
NAMESPACE = Namespace(
    weights_digest="ab", kv_dtype="bfloat16", layers=32, kv_heads=8, head_dim=128,
    kind=NamespaceKind.OPAQUE, adapter_digest="cd", fidelity=Fidelity.INT8, layout_version=2,
    block_tokens=32, rope="linear:8", attention="window:4096", rotation="hadamard",
    kv_scales="ef", group="mla",
)  # fmt: skip
TEXT = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), max_size=40)
COUNTS = st.integers(0, 2**32 - 1)


def test_a_namespace_keeps_its_digest_over_the_wire() -> None:
    wire = types_pb2.Namespace.FromString(namespace_to_proto(NAMESPACE).SerializeToString())
    assert namespace_from_proto(wire) == NAMESPACE
    assert namespace_from_proto(wire).digest() == NAMESPACE.digest()


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("kind", "ours", BadInput),
        ("kind", "", BadInput),
        ("fidelity", "lossless", BadInput),
        ("weights_digest", "", BadInput),
        ("layers", 0, BadInput),
        ("block_tokens", 17, BadInput),
        ("rope", "é" * (MAX_NAMESPACE_TEXT // 2 + 1), TooLarge),
    ],
)
def test_a_bad_namespace_names_its_field(field: str, value: Any, error: type[BadInput]) -> None:
    wire = namespace_to_proto(NAMESPACE)
    setattr(wire, field, value)
    with pytest.raises(error, match=field):
        namespace_from_proto(wire)


EVENTS = st.one_of(
    st.builds(
        Began,
        publisher=TEXT, incarnation=COUNTS, sequence=COUNTS, host=TEXT,
        tiers=st.lists(st.sampled_from(TierKind), max_size=3).map(tuple),
    ),
    st.builds(
        Changed,
        root=st.just(ROOT), tier=st.sampled_from(TierKind), names=st.lists(st.sampled_from(NAMES)),
        deleted=st.booleans(), first_sequence=COUNTS, block_bytes=COUNTS, group=TEXT,
    ),
    st.builds(Ended, COUNTS),
    st.builds(
        Marked,
        COUNTS,
        st.lists(
            st.builds(Digest, st.sampled_from(TierKind), COUNTS, st.integers(0, 2**64 - 1)),
            max_size=3,
        ).map(tuple),
    ),
    st.builds(
        Loaded,
        running=COUNTS, waiting=COUNTS, queued_tokens=COUNTS, kv_used_bytes=COUNTS,
        kv_capacity_bytes=COUNTS, prefill_tokens_per_s=st.floats(0, 1e6),
        decode_tokens_per_s=st.floats(0, 1e6), prefill_linear_s=st.floats(0, 1),
        prefill_quadratic_s=st.floats(0, 1), draining=st.booleans(),
        queued_token_depths=st.floats(0, 1e12),
        load_rates=st.lists(
            st.builds(LoadRate, st.sampled_from(TierKind), st.floats(1e-9, 1)), max_size=3
        ).map(tuple),
        role=st.sampled_from(WorkerRole),
    ),
)  # fmt: skip


@given(EVENTS)
def test_events_survive_the_wire(event: Event) -> None:
    wire = event_to_reply(event).SerializeToString()
    assert event_from_reply(watch_pb2.WatchReply.FromString(wire)) == event


def test_a_loss_is_silence_and_not_a_message() -> None:
    with pytest.raises(AssertionError):
        event_to_reply(Lost("gone"))


def test_kinds_of_a_newer_peer_are_skipped() -> None:
    assert event_from_reply(watch_pb2.WatchReply()) is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"root": b"short"}, BadInput, "root has 5 bytes"),
        ({"names": b"x" * 33}, BadInput, "33 bytes"),
        ({"tier": 0}, BadInput, "tier 0"),
        ({"group": "a\nb"}, BadInput, "group"),
        ({"group": "a" * (MAX_ID_BYTES + 1)}, TooLarge, "group"),
    ],
)
def test_malformed_events_are_refused(
    change: dict[str, Any], error: type[BadInput], message: str
) -> None:
    whole = event_to_reply(Changed(ROOT, TierKind.DRAM, NAMES, first_sequence=1))
    for name, value in change.items():
        setattr(whole.events, name, value)
    with pytest.raises(error, match=message):
        event_from_reply(whole)


@pytest.mark.parametrize("field", ["publisher", "host"])
def test_publishers_have_printable_names(field: str) -> None:
    changed: dict[str, Any] = {field: "a\x00b"}
    bad = replace(Began("node-a", 1, 0, (TierKind.DRAM,), "host"), **changed)
    with pytest.raises(BadInput, match=field):
        event_from_reply(event_to_reply(bad))


def test_numbers_of_names_are_bounded() -> None:
    assert check_names(bytes(64)) == 2
    assert check_names(b"") == 0
    assert check_names(bytes(32 * MAX_NAMES_PER_CALL)) == MAX_NAMES_PER_CALL
    with pytest.raises(TooLarge, match=str(MAX_NAMES_PER_CALL + 1)):
        check_names(bytes(32 * (MAX_NAMES_PER_CALL + 1)))
    with pytest.raises(BadInput, match="31 bytes"):
        check_names(bytes(31))


def test_roots_tiers_and_identifiers() -> None:
    assert root_from_wire(bytes(32)) == bytes(32)
    with pytest.raises(BadInput, match="33 bytes"):
        root_from_wire(bytes(33))
    assert tier_from_wire(2) is TierKind.DRAM
    with pytest.raises(BadInput, match="tier 9"):
        tier_from_wire(9)
    assert check_id("node-ä", "name") == "node-ä"


@pytest.mark.parametrize(
    ("tier", "s_per_token"),
    [(1, 0.0), (2, -1.0), (3, math.nan), (4, math.inf), (9, 1.0), (0, 1.0)],
)
def test_rates_that_cannot_be_are_dropped_and_nothing_else(tier: int, s_per_token: float) -> None:
    """One refused report would end a stream that comes back with a snapshot and the next one."""
    sound = LoadRate(TierKind.DRAM, 5e-6)
    reply = event_to_reply(Loaded(running=3, load_rates=(sound,)))
    # As bytes: an enum of this build refuses a number that it does not know.
    reply.load.MergeFromString(
        b"\x62\x0b\x08" + bytes([tier]) + b"\x11" + struct.pack("<d", s_per_token)
    )
    assert len(reply.load.load_rates) == 2
    assert event_from_reply(reply) == Loaded(running=3, load_rates=(sound,))


def test_a_role_of_a_newer_worker_is_no_role_here() -> None:
    reply = event_to_reply(Loaded(running=3, role=WorkerRole.DECODE))
    assert reply.load.role == "decode"
    reply.load.role = "encode"
    assert event_from_reply(reply) == Loaded(running=3)
    assert event_to_reply(Loaded()).load.role == ""
