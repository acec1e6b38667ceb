"""Loads layer by layer, over a real node: what the forward may read after each wait."""

import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvstore.adapters.vllm import layer_loads
from kvstore.adapters.vllm.plan import StoreJob
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_MS, PATIENCE_S, until_so
from tests.vllm_halves import LAYOUT, Engine, Request

STORED, LOADED = [5, 2, 7, 1], [0, 3, 6, 4]


class LayerEngine(Engine):
    """As vLLM with `layerwise`: a request runs in the step that loads it."""

    def __init__(self, run_dir: str, seed: int, *, patience_ms: int = PATIENCE_MS) -> None:
        super().__init__(run_dir, seed, patience_ms=patience_ms, layerwise=True)
        self.plan: Any = None

    def found(self) -> Request:
        """Return a request whose answer came in time: on a slow machine not the first one's."""
        asked: list[Request] = []

        def in_time() -> bool:
            asked.append(Request(secrets.token_hex(4)))
            return self.matched(asked[-1]) == 96

        until_so(in_time)
        return asked[-1]

    def begin(self, request: Request) -> None:
        """Plan the request's only step and begin its loads."""
        assert self.matched(request) == 96
        assert self.scheduler.matched(request, 0) == (96, False), "vLLM is told to load in the step"
        self.scheduler.allocated(request, LOADED, 96)
        self.plan = self.scheduler.step(
            [(request.request_id, 100)], blocks_of=lambda _: LOADED, preempted=(),
            scheduled_tokens=4,
        )  # fmt: skip
        assert [job.request for job in self.plan.loads] == [request.request_id]
        self.worker.load_by_layers(self.plan.loads)

    def end(self) -> set[int]:
        """End the step; return the blocks that are told as bad."""
        if self.worker.end_layers():
            for job in self.plan.stores:
                self.worker.store(job)
        else:
            self.worker.drop(self.plan.stores)
        bad = self.worker.bad_blocks()
        self.scheduler.loads_ended((), bad)
        return bad


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=16 << 20) as running:
        yield running


@pytest.fixture
def engines(node: RunningNode) -> Iterator[tuple[Engine, LayerEngine]]:
    both = Engine(str(node.run_dir), 1), LayerEngine(str(node.run_dir), 2)
    until_so(lambda: all(engine.link.usable for engine in both))
    both[0].compute_and_store("a", STORED)
    yield both
    for engine in both:
        engine.close()


def test_after_each_wait_that_layer_is_there_and_the_next_need_not_be(
    engines: tuple[Engine, LayerEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = engines
    go_on = threading.Event()
    copied = two.worker._pages.load_layer

    def load_layer(source: memoryview, block: int, part: int, layer: int) -> None:
        if layer == 1:
            assert go_on.wait(PATIENCE_S), "the forward did not go on after its first layer"
        copied(source, block, part, layer)

    monkeypatch.setattr(two.worker._pages, "load_layer", load_layer)
    two.begin(Request("b"))
    two.worker.wait_for_layer(0)
    assert np.array_equal(one.layers[0][STORED[:3]], two.layers[0][LOADED[:3]])
    assert not np.array_equal(one.layers[1][STORED[:3]], two.layers[1][LOADED[:3]])
    go_on.set()
    two.worker.wait_for_layer(1)
    assert np.array_equal(one.layers[1][STORED[:3]], two.layers[1][LOADED[:3]])
    assert two.end() == set()
    counts = two.worker.take_counts()
    assert (counts["loaded_tokens"], counts["loaded_blocks_dram"]) == (96, 6)


def test_a_step_without_loads_waits_for_nothing(engines: tuple[Engine, LayerEngine]) -> None:
    _, two = engines
    two.worker.load_by_layers([])
    two.worker.wait_for_layer(LAYOUT.layers - 1)
    assert two.worker.end_layers() is True
    assert two.worker.bad_blocks() == set()


def test_a_slot_that_was_given_away_is_told_and_nothing_of_the_step_is_stored(
    engines: tuple[Engine, LayerEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, two = engines
    client = two.link.client
    assert client is not None
    still = client.still
    asked: list[Any] = []

    def reused(ref: Any) -> bool:
        asked.append(ref)
        return len(asked) != 4 and still(ref)  # the second half of the second engine block

    monkeypatch.setattr(client, "still", reused)
    longer = list(range(100)) + list(range(900, 1000))
    two.begin(Request("c"))
    two.plan.stores.append(StoreJob("x", [], [], 0))
    assert two.end() == {LOADED[1], LOADED[2]}
    assert two.worker.take_counts()["dropped_stores"] == 1
    assert two.scheduler.matched(Request("c"), 0) == (0, False), "it does not load again"
    monkeypatch.undo()
    assert two.matched(Request("d", prompt_token_ids=longer)) == 96, "others do"


def test_a_node_that_hangs_costs_the_forward_a_deadline(
    node: RunningNode, engines: tuple[Engine, LayerEngine]
) -> None:
    one, two = engines[0], LayerEngine(str(node.run_dir), 3, patience_ms=500)
    request = two.found()
    node.signal_node(signal.SIGSTOP)
    try:
        two.begin(request)
        for layer in range(LAYOUT.layers):
            two.worker.wait_for_layer(layer)
        assert two.end() == set(LOADED[:3])
    finally:
        node.signal_node(signal.SIGCONT)

    def loaded() -> bool:
        two.begin(two.found())
        return two.end() == set()

    until_so(loaded)
    for ours, theirs in zip(one.layers, two.layers, strict=True):
        assert np.array_equal(ours[STORED[:3]], theirs[LOADED[:3]])
    two.close()


def test_a_bug_in_a_copy_lets_the_forward_go_on_and_is_counted(
    engines: tuple[Engine, LayerEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, two = engines

    def broken(source: memoryview, block: int, part: int, layer: int) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(two.worker._pages, "load_layer", broken)
    two.begin(Request("u"))
    for layer in range(LAYOUT.layers):
        two.worker.wait_for_layer(layer)
    assert two.end() == set(LOADED[:3])
    seen: Counter[str] = Counter()

    def counted() -> bool:
        two.worker.load_by_layers([])
        two.worker.end_layers()
        seen.update(two.worker.take_counts())
        return seen["unexpected"] == 1

    until_so(counted)
    assert (seen["loaded_tokens"], seen["lost_tokens"]) == (0, 96)


def test_pages_that_nobody_waits_for_any_more_are_not_written(
    engines: tuple[Engine, LayerEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, two = engines
    monkeypatch.setattr(layer_loads, "_GRACE_S", 0.1 - 2 * PATIENCE_S)  # 100 ms in all
    written: list[int] = []
    monkeypatch.setattr(two.worker._pages, "load_layer", lambda *_: written.append(1))
    held_up = threading.Event()

    async def hold() -> None:
        held_up.wait(PATIENCE_S)

    request = Request("e")
    assert two.matched(request) == 96
    two.link.submit(hold())
    two.begin(request)
    two.worker.wait_for_layer(0)
    assert two.end() == set(LOADED[:3])
    held_up.set()
    ended = two.link.submit(_settled())
    until_so(ended.done)
    time.sleep(0.1)  # a copy that was begun all the same would be seen now
    assert written == []


async def _settled() -> None:
    """Run behind what the loop had to do."""
