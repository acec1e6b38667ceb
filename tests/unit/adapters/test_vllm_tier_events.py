"""What vLLM hears of chunks in a node: each stored once, each removed once, as the node lists them.

The pure part over made events, then the thread over a real node that is overfilled and killed.
"""

import ctypes
import hashlib
import time
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import REGISTRY

from kvstore.adapters.opaque import OpaqueBlocks, Piece, StoreAddress
from kvstore.adapters.vllm import tier_events as module
from kvstore.adapters.vllm.tier_events import Following, TierEvents, Told
from kvstore.adapters.vllm.tier_jobs import TierJobs
from kvstore.adapters.vllm.tier_settings import tier_name
from kvstore.core.names import Namespace, NamespaceKind, Root
from kvstore.directory.events import Began, Changed, Ended, Loaded, Lost, TierKind
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_S

ROOT = Root(b"r" * 32)
DRAM, NVME = TierKind.DRAM, TierKind.NVME
A, B, C = b"key a", b"key b", b"key c"
ROW = 1 << 20


def changed(*keys: bytes, tier: TierKind = DRAM, deleted: bool = False) -> Changed:
    return Changed(ROOT, tier, [tier_name(key) for key in keys], deleted, 1)


def began(*tiers: TierKind) -> Began:
    return Began("node", 1, 0, tiers)


def stored(*keys: bytes) -> Told:
    return Told(keys, False)


def removed(*keys: bytes) -> Told:
    return Told(keys, True)


# -- what is known ------------------------------------------------------------------------------


def test_a_chunk_is_told_when_the_node_lists_it_and_when_no_tier_has_it() -> None:
    following = Following()
    following.stored([A, B])
    assert following.take() == []
    following.apply(changed(B, C))  # C is another engine's
    following.apply(changed(A))
    following.apply(changed(A, tier=NVME))
    assert following.take() == [stored(B, A)]
    following.apply(changed(A, B, C, deleted=True))
    assert following.take() == [removed(B)]
    following.apply(changed(A, tier=NVME, deleted=True))
    following.apply(changed(A, tier=NVME, deleted=True))
    following.apply(Loaded())
    assert following.take() == [removed(A)]


def test_what_the_node_had_before_is_told_at_once_and_once() -> None:
    following = Following()
    following.apply(changed(A))
    following.stored([A])
    following.stored([A])
    following.apply(changed(A))
    assert following.take() == [stored(A)]
    following.apply(changed(A, deleted=True))
    following.stored([A])
    following.apply(changed(A))
    assert following.take() == [removed(A), stored(A)]


def test_a_snapshot_takes_away_what_it_does_not_list() -> None:
    following = Following()
    following.apply(changed(A, B, C))
    following.apply(changed(B, tier=NVME))
    following.stored([A, B, C])
    following.take()
    following.apply(Lost("the node restarts"))
    following.apply(began(DRAM))
    following.apply(changed(C))
    assert following.take() == [], "not before its end"
    following.apply(Ended(0))
    assert following.take() == [removed(A)]  # B is in a tier that it does not speak for
    following.apply(began(DRAM, NVME))
    following.apply(changed(B, C))
    following.apply(changed(C, deleted=True))
    assert following.take() == [removed(C)]
    following.apply(Ended(0))
    assert following.take() == []
    following.apply(changed(B, deleted=True))
    assert following.take() == [removed(B)], "the snapshot took it from the disk"


def test_a_snapshot_cut_short_says_nothing() -> None:
    following = Following()
    following.apply(changed(A))
    following.stored([A])
    following.apply(began(DRAM))
    following.apply(Lost("cut"))
    following.apply(Ended(0))
    assert following.take() == [stored(A)]


def test_everything_is_bounded_and_what_is_not_followed_is_not_told() -> None:
    following = Following(max_followed=2, max_awaited=2, max_told=4)
    following.stored([b"old", A, B])  # the oldest is waited for no more
    following.apply(changed(b"old", A, B))
    assert following.take() == [stored(A)]
    assert following.dropped == 2
    following.apply(changed(B, deleted=True))
    assert following.take() == []
    for _ in range(9):
        following.apply(changed(A, deleted=True))
        following.stored([A])
        following.apply(changed(A))
    told = following.take()
    assert sum(len(run.keys) for run in told) <= 4
    assert told[-1] == stored(A), "the latest word is the one that counts"


# -- over a real node ---------------------------------------------------------------------------


@pytest.fixture
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=64 << 20) as running:
        yield running


def opened(node: RunningNode) -> tuple[TierJobs, OpaqueBlocks]:
    namespace = Namespace(weights_digest="w", kv_dtype="bf16", layers=1, kv_heads=1, head_dim=1,
                          kind=NamespaceKind.OPAQUE)  # fmt: skip
    blocks = OpaqueBlocks(StoreAddress(where=str(node.run_dir)), namespace, ROW)
    return TierJobs(blocks, threads=1, events=TierEvents(blocks.publisher)), blocks


class Engine:
    """What vLLM's scheduler does: hands over stores, and takes jobs and events after each step."""

    def __init__(self, jobs: TierJobs) -> None:
        self._jobs = jobs
        self._row = ctypes.create_string_buffer(ROW)
        self.held: set[bytes] = set()

    def store(self, label: str, count: int) -> list[bytes]:
        keys = [hashlib.sha256(f"{label} {at}".encode()).digest() for at in range(count)]
        rows = [[Piece(ctypes.addressof(self._row), ROW)]] * count
        self._jobs.store(1, keys, rows)
        self._jobs.drain()
        (done,) = self._jobs.finished()
        assert done.keys
        return list(done.keys)

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < deadline
            for told in self._jobs.told():
                keys = set(told.keys)
                assert keys.isdisjoint(self.held) != told.removed, "told once each way"
                self.held = self.held - keys if told.removed else self.held | keys
            time.sleep(0.005)


def test_what_an_overfull_node_evicts_is_told(node: RunningNode) -> None:
    jobs, blocks = opened(node)
    engine = Engine(jobs)
    first = engine.store("first", 20)
    engine.until(lambda: engine.held == set(first))
    for turn in range(6):
        engine.store(f"more {turn}", 20)
    gone = [key for key in first if not blocks.held([tier_name(key)])[0]]
    assert gone, "the arena has room for 60 and was given 140"
    engine.until(lambda: engine.held.isdisjoint(gone))
    now = [key for key in engine.held if blocks.held([tier_name(key)])[0]]
    engine.until(lambda: engine.held == set(now))
    jobs.close()
    jobs.close()


def test_a_node_that_comes_back_is_followed_again(node: RunningNode) -> None:
    jobs, blocks = opened(node)
    engine = Engine(jobs)
    kept = engine.store("kept", 3)
    engine.until(lambda: engine.held == set(kept))
    before = node.incarnation
    node.kill_node()
    node.wait_restarted(before)
    assert engine.held == set(kept), "the arena outlives the node"
    deadline = time.monotonic() + PATIENCE_S
    while not all(blocks.held([tier_name(key) for key in kept])):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    more = engine.store("after", 2)
    engine.until(lambda: engine.held == {*kept, *more})
    client = blocks._client
    assert client is not None
    client.clear()
    engine.until(lambda: not engine.held)
    jobs.close()


def test_another_root_is_followed_after_a_new_session(node: RunningNode) -> None:
    """A keeper that starts anew may give another root; the chunks' names stay."""
    jobs, blocks = opened(node)
    engine = Engine(jobs)
    kept = engine.store("kept", 2)
    at = blocks.publisher()
    assert at is not None
    where = [("unix:/nowhere/node.sock", Root(b"other" * 6 + b"!!")), at]
    events = TierEvents(lambda: where[0])
    events.stored(kept)
    where.reverse()
    told: list[Told] = []
    deadline = time.monotonic() + PATIENCE_S
    while not told:
        assert time.monotonic() < deadline
        told += events.take()
        time.sleep(0.005)
    assert told == [stored(*kept)]
    events.close()
    events.stored([A])
    jobs.close()


def test_nobody_is_followed_without_a_session_and_nothing_told_without_events() -> None:
    events = TierEvents(lambda: None)
    events.stored([])
    events.stored([A])
    assert events.take() == []
    events.close()


def test_the_scheduler_does_not_wait_for_a_snapshot() -> None:
    following = Following()
    events = TierEvents(lambda: None, following)
    following.apply(changed(A))
    events.stored([A])
    with events._lock:
        assert events.take() == []
    assert events.take() == [stored(A)]


def test_what_was_dropped_is_counted() -> None:
    def refused() -> float:
        labels = {"engine": "vllm-tier"}
        return REGISTRY.get_sample_value("kvstore_adapter_refused_tasks_total", labels) or 0.0

    following = Following(max_awaited=1)
    events = TierEvents(lambda: None, following)
    events.stored([A, B])
    before = refused()
    assert events.take() == events.take() == []
    assert refused() == before + 1


def test_a_bug_in_the_thread_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def failures() -> float:
        labels = {"engine": "vllm-tier", "call": "watch"}
        return REGISTRY.get_sample_value("kvstore_adapter_failures_total", labels) or 0.0

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "WatchClient", broken)
    before = failures()
    events = TierEvents(lambda: ("unix:/nowhere", ROOT))
    events.stored([A])
    assert events._thread is not None
    events._thread.join(PATIENCE_S)
    assert failures() == before + 1
    events.close()
