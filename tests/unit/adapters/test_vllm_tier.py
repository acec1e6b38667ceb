"""vLLM's tier calls in vLLM's order, over a real node and without vLLM's package.

`kvstore.adapters.vllm.tier` only translates; tests/engines/test_vllm_tier.py runs it.
"""

import ctypes
import hashlib
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from kvstore.adapters.opaque import OpaqueBlocks, Piece
from kvstore.adapters.vllm import tier_jobs as module
from kvstore.adapters.vllm.tier_jobs import Done, TierJobs
from kvstore.adapters.vllm.tier_settings import read_tier_settings, tier_name, tier_namespace
from kvstore.core.errors import BadInput
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_MS, PATIENCE_S, until_so

ROW = 20_000
PATIENT = {"call_ms": PATIENCE_MS, "transfer_ms": PATIENCE_MS}
KEPT: list[Any] = []
"""Memory of every test here: jobs that outlive theirs must not write elsewhere."""


TP1 = SimpleNamespace(tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, is_parallelism_agnostic=False)


def configured(**more: Any) -> SimpleNamespace:
    """Return the fields of vLLM's `OffloadingConfig`."""
    fields = {
        "model": SimpleNamespace(name="m", dtype="bfloat16"),
        "cache": SimpleNamespace(tokens_per_hash=32, blocks_per_chunk=2),
        "groups": (SimpleNamespace(tokens_per_block=32, layer_names=("l0", "l1")),),
        "parallel": TP1,
        "kv_cache_layout": None,
        "canonical_layout": False,
        "replicated_layout": False,
    }
    return SimpleNamespace(**fields | more)


@dataclass
class Rows:
    """vLLM's CPU tier."""

    count: int
    buffer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(self.count * ROW)
        KEPT.append(self.buffer)

    def chunks(self, *at: int) -> list[list[Piece]]:
        base = ctypes.addressof(self.buffer)
        return [[Piece(base + number * ROW, ROW)] for number in at]

    def fill(self, at: int, content: bytes) -> None:
        self.buffer[at * ROW : (at + 1) * ROW] = content

    def row(self, at: int) -> bytes:
        found: bytes = self.buffer[at * ROW : (at + 1) * ROW]
        return found


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as running:
        yield running


def opened(where: object, **more: Any) -> TierJobs:
    settings = read_tier_settings({"run_dir": str(where), "weights_digest": "w", **PATIENT, **more})
    blocks = OpaqueBlocks(settings.address, tier_namespace(configured(), settings, ROW), ROW)
    return TierJobs(blocks, threads=settings.threads)


@pytest.fixture
def tier(node: RunningNode) -> Iterator[TierJobs]:
    tier = opened(node.run_dir)
    yield tier
    tier.close()


def keys(label: str, count: int) -> list[bytes]:
    """Return keys as vLLM makes them: a hash and a group."""
    hashes = [hashlib.sha256(f"{label} {at}".encode()).digest() for at in range(count)]
    return [one + (at % 2).to_bytes(4, "big") for at, one in enumerate(hashes)]


def content(key: bytes) -> bytes:
    return hashlib.shake_128(key).digest(ROW)


def failures(call: str) -> float:
    """Return how many calls of the process failed unforeseen: other tests may have had some."""
    labels = {"engine": "vllm-tier", "call": call}
    return REGISTRY.get_sample_value("kvstore_adapter_failures_total", labels) or 0.0


def ended(tier: TierJobs) -> list[Done]:
    tier.drain()
    return tier.finished()


def known(tier: TierJobs, request: str, wanted: list[bytes]) -> list[bool]:
    """Ask step by step, as the scheduler does, until every verdict is there."""
    ends_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < ends_s:
        found = [tier.verdict(request, key) for key in wanted]
        if None not in found:
            return [bool(one) for one in found]
        tier.ask()
        time.sleep(0.002)
    raise AssertionError("no verdict")


def stored(tier: TierJobs, label: str, count: int) -> list[bytes]:
    wanted, rows = keys(label, count), Rows(count)
    for at, key in enumerate(wanted):
        rows.fill(at, content(key))
    tier.store(1, wanted, rows.chunks(*range(count)))
    (done,) = ended(tier)
    assert (done.whole, done.moved_bytes) == (True, count * ROW)
    return wanted


def test_chunks_come_back_bit_for_bit_in_any_order(node: RunningNode, tier: TierJobs) -> None:
    wanted = stored(tier, "round", 6)
    other = opened(node.run_dir)
    assert known(other, "r", wanted) == [True] * 6
    rows, order = Rows(8), [5, 0, 3]
    other.load(7, "r", [wanted[at] for at in order], rows.chunks(2, 6, 4))
    (done,) = ended(other)
    assert (done.job, done.whole, len(done.keys)) == (7, True, 3)
    for row, at in zip((2, 6, 4), order, strict=True):
        assert rows.row(row) == content(wanted[at])
    assert rows.row(0) == bytes(ROW) and not other.pending()
    other.close()


def test_the_first_answer_is_never_waited_for(tier: TierJobs) -> None:
    wanted = stored(tier, "first", 2)
    assert [tier.verdict("r", key) for key in wanted] == [None, None]
    assert tier.pending()
    assert known(tier, "r", [*wanted, *keys("unknown", 2)]) == [True, True, False, False]
    tier.forget("r")
    assert tier.verdict("r", wanted[0]) is None  # a new request asks anew


def test_what_was_lost_before_its_load_is_a_miss_from_then_on(tier: TierJobs) -> None:
    wanted = [*stored(tier, "partly", 2), *keys("gone", 1)]
    assert known(tier, "r", wanted) == [True, True, False]
    tier.load(1, "r", wanted, Rows(3).chunks(0, 1, 2))
    (done,) = ended(tier)
    assert (done.whole, list(done.keys)) == (False, wanted[:2])
    assert known(tier, "r", wanted) == [True, True, False]


def test_a_verdict_that_turned_out_false_is_not_given_again(
    tier: TierJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = stored(tier, "evicted", 2)
    assert known(tier, "r", wanted) == [True, True]
    monkeypatch.setattr(OpaqueBlocks, "load", lambda self, names, into: [False] * len(names))
    tier.load(1, "r", wanted, Rows(2).chunks(0, 1))
    (done,) = ended(tier)
    assert not done.whole and done.keys == ()
    assert [tier.verdict("r", key) for key in wanted] == [False, False]


def test_a_node_that_hangs_or_is_dead_never_holds_the_scheduler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting: list[str] = []
    tried = OpaqueBlocks._tried

    def noted(self: OpaqueBlocks, work: Any, otherwise: Any) -> Any:
        waiting.append(threading.current_thread().name)
        return tried(self, work, otherwise)

    with start_node(arena_bytes=64 << 20) as node:
        patient = opened(node.run_dir)
        wanted = stored(patient, "hang", 2)
        patient.close()
        tier = opened(node.run_dir, call_ms=100, pause_ms=50)
        until_so(lambda: known(tier, secrets.token_hex(4), wanted) == [True, True])
        monkeypatch.setattr(OpaqueBlocks, "_tried", noted)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            node.kill_keeper() if number is signal.SIGKILL else node.signal_node(number)
            tier.verdict(str(number), wanted[0])
            tier.ask()
            tier.load(int(number), str(number), wanted, Rows(2).chunks(0, 1))
            known(tier, str(number), wanted[:1])
            assert [done.job for done in ended(tier)] == [number]
        tier.close()
    assert waiting and all(name.startswith("kvstore-tier") for name in waiting)


def test_too_many_jobs_fail_at_once(tier: TierJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_JOBS", 1)
    monkeypatch.setattr(module, "MAX_ASKED", 1)
    held = threading.Event()
    monkeypatch.setattr(
        OpaqueBlocks, "store", lambda self, names, blocks: [held.wait(PATIENCE_S)] * len(names)
    )
    wanted = keys("many", 2)
    tier.store(1, wanted, Rows(2).chunks(0, 1))
    tier.store(2, wanted, Rows(2).chunks(0, 1))
    (refused,) = tier.finished()
    assert (refused.job, refused.whole) == (2, False)
    assert [tier.verdict("r", key) for key in wanted] == [None, False]
    assert tier.refused == 2
    held.set()
    assert [(done.job, done.whole) for done in ended(tier)] == [(1, True)]


def test_a_bug_ends_a_job_all_the_same(tier: TierJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, names: Any, blocks: Any) -> list[bool]:
        raise ZeroDivisionError

    monkeypatch.setattr(OpaqueBlocks, "store", broken)
    before = failures("copy")
    tier.store(3, keys("bug", 1), Rows(1).chunks(0))
    (done,) = ended(tier)
    assert (done.job, done.whole, done.keys) == (3, False, ())
    assert failures("copy") == before + 1


def test_a_bug_in_a_lookup_is_a_miss_and_counted(
    tier: TierJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, names: Any) -> list[bool]:
        raise ZeroDivisionError

    monkeypatch.setattr(OpaqueBlocks, "held", broken)
    before = failures("lookup")
    assert known(tier, "bug", keys("bug", 2)) == [False, False]
    assert failures("lookup") == before + 1


def test_whatever_vllms_keys_omit_is_in_the_namespace() -> None:
    settings = read_tier_settings({"run_dir": "/x", "weights_digest": "w"})
    tp2 = SimpleNamespace(**vars(TP1) | {"tp_size": 2})
    agnostic = SimpleNamespace(**vars(tp2) | {"is_parallelism_agnostic": True})
    one = SimpleNamespace(**vars(agnostic) | {"tp_size": 1})
    made = [
        tier_namespace(configured(**more), settings, ROW).digest()
        for more in (
            {}, {"parallel": tp2}, {"parallel": agnostic}, {"canonical_layout": True},
            {"model": SimpleNamespace(name="m", dtype="float16")}, {"groups": ()},
            {"cache": SimpleNamespace(tokens_per_hash=32, blocks_per_chunk=4)},
        )
    ]  # fmt: skip
    assert len(set(made)) == len(made)
    assert made[2] == tier_namespace(configured(parallel=one), settings, ROW).digest()
    assert tier_namespace(configured(), settings, ROW + 1).digest() != made[0]
    other = read_tier_settings({"run_dir": "/x", "weights_digest": "v"})
    assert tier_namespace(configured(), other, ROW).digest() != made[0]
    first, second = keys("names", 2)
    assert len({tier_name(first), tier_name(second), tier_name(first[:-1])}) == 3


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({}, "run_dir"), ({"run_dir": "/x", "rundir": "/y"}, "rundir"),
        ({"run_dir": "/x", "threads": 0}, "threads"), ({"run_dir": 5}, "run_dir"),
        ({"run_dir": "/x", "call_ms": "9"}, "call_ms"),
        ({"run_dir": "/x", "call_ms": -1}, "call_ms"),
    ],
    ids=range(6),
)  # fmt: skip
def test_wrong_settings_are_named(said: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        read_tier_settings(said)
