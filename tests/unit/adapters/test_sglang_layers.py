"""The count of layers that the forward waits for: what lands, what fails, what never ends."""

import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest

from kvstore.adapters.sglang import layers
from kvstore.adapters.sglang.layers import LayerCounter
from kvstore.core.errors import Unreachable
from tests.patience import PATIENCE_S


def waiting(counter: LayerCounter, layer: int) -> threading.Thread:
    thread = threading.Thread(target=counter.wait_until, args=(layer,))
    thread.start()
    return thread


def test_the_forward_waits_for_its_layer_and_no_longer() -> None:
    counter = LayerCounter(3, stall_ms=20_000)
    index = counter.begin()
    counter.set_consumer(index)
    second = waiting(counter, 1)
    assert counter.land(index)
    counter.wait_until(0)
    assert second.is_alive()
    assert counter.land(index)
    second.join(PATIENCE_S)
    assert not second.is_alive()
    assert counter.land(index)
    counter.end(index)
    assert counter.finish(index)
    assert counter.finish(index), "what is forgotten has nothing to wait for"
    counter.wait_until(2)


def test_a_failed_load_lets_the_forward_go_on_and_is_told_at_its_end() -> None:
    counter = LayerCounter(3, stall_ms=20_000)
    first, second = counter.begin(), counter.begin()
    counter.set_consumer(first)
    assert counter.land(first)
    forward = waiting(counter, 2)
    counter.fail(first)
    forward.join(PATIENCE_S)
    assert not forward.is_alive()
    assert not counter.land(first), "the loader has to stop"
    counter.end(first)
    assert not counter.finish(first)
    for _ in range(3):
        assert counter.land(second)
    counter.end(second)
    assert counter.finish(second), "another load is another load"


def test_layers_that_are_missing_at_the_end_are_a_failure() -> None:
    counter = LayerCounter(2, stall_ms=20_000)
    index = counter.begin()
    counter.set_consumer(index)
    counter.land(index)
    counter.end(index)
    counter.wait_until(1)
    assert not counter.finish(index)


def test_no_load_is_no_wait_and_a_reset_lets_go() -> None:
    counter = LayerCounter(2, stall_ms=20_000)
    counter.wait_until(1)
    counter.set_consumer(-1)
    counter.wait_until(0)
    index = counter.begin()
    counter.set_consumer(index)
    forward = waiting(counter, 0)
    counter.reset()
    forward.join(PATIENCE_S)
    assert not forward.is_alive()
    assert not counter.land(index)
    assert counter.begin() == 0


def test_sglang_reads_who_is_waited_for_and_how_many_layers_there_are() -> None:
    """As its `prefill_cuda_graph_runner` and its Mamba pool do, of whatever counter they have."""
    counter = LayerCounter(3, stall_ms=20_000)
    assert (counter.consumer_index, counter.num_layers) == (-1, 3)
    index = counter.begin()
    assert counter.consumer_index == -1, "the scheduler says who waits"
    counter.set_consumer(index)
    assert counter.consumer_index == index
    forward = waiting(counter, counter.num_layers - 1)
    for _ in range(3):
        assert forward.is_alive()
        assert counter.land(index)
    forward.join(PATIENCE_S)
    assert not forward.is_alive()
    counter.set_consumer(-1)
    assert counter.consumer_index == -1
    counter.set_consumer(index)
    counter.reset()
    assert counter.consumer_index == -1


class Clock:
    """Time for one thread: it goes on while somebody waits, and then what is planned happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, counter: LayerCounter) -> None:
        self.now_s = 1_000.0
        self.plan: list[tuple[float, Callable[[], object]]] = []
        monkeypatch.setattr(layers, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(counter._changed, "wait", self._wait)

    def every(self, step_s: float, *calls: Callable[[], object]) -> None:
        first = self.now_s
        self.plan = [(first + step_s * (at + 1), call) for at, call in enumerate(calls)]

    def _wait(self, timeout: float) -> bool:
        due_s = self.now_s + timeout
        if self.plan and self.plan[0][0] <= due_s:
            self.now_s, call = self.plan.pop(0)
            call()
            return True
        self.now_s = due_s
        return False


def test_a_loader_that_does_not_move_costs_a_deadline_and_then_the_engine_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = LayerCounter(2, stall_ms=20)
    clock = Clock(monkeypatch, counter)
    index = counter.begin()
    counter.set_consumer(index)
    counter.wait_until(0)
    assert clock.now_s == pytest.approx(1_000.02)
    assert not counter.land(index)
    with pytest.raises(Unreachable, match="still writes"):
        counter.finish(index)


def test_a_load_behind_a_slow_one_is_not_late_as_long_as_the_loader_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = LayerCounter(3, stall_ms=1_000)
    clock = Clock(monkeypatch, counter)
    slow, behind = counter.begin(), counter.begin()
    counter.set_consumer(behind)
    lands = [partial(counter.land, slow)] * 3 + [partial(counter.end, slow)]
    clock.every(0.9, *lands, *[partial(counter.land, behind)] * 3, partial(counter.end, behind))
    counter.wait_until(0)
    assert clock.now_s == pytest.approx(1_000 + 5 * 0.9)
    assert counter.finish(behind)
    assert counter.finish(slow)


def test_a_load_behind_a_slow_one_is_finished_without_a_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = LayerCounter(1, stall_ms=1_000)
    clock = Clock(monkeypatch, counter)
    slow, behind = counter.begin(), counter.begin()
    clock.every(
        0.9, partial(counter.land, slow), partial(counter.end, slow),
        partial(counter.land, behind), partial(counter.end, behind),
    )  # fmt: skip
    assert counter.finish(behind)


def test_what_others_do_does_not_keep_a_stalled_load_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = LayerCounter(2, stall_ms=1_000)
    clock = Clock(monkeypatch, counter)
    index, other = counter.begin(), counter.begin()
    counter.set_consumer(index)
    # Loads that are begun or given up meanwhile are not the loader's doing.
    others: list[Callable[[], object]] = [counter.begin, partial(counter.fail, other)]
    clock.every(0.4, *others * 20)
    counter.wait_until(0)
    assert clock.now_s == pytest.approx(1_001)
    with pytest.raises(Unreachable, match="still writes"):
        counter.finish(index)
    assert clock.now_s == pytest.approx(1_002)


def test_an_idle_time_is_not_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = LayerCounter(1, stall_ms=1_000)
    clock = Clock(monkeypatch, counter)
    first = counter.begin()
    assert counter.land(first)
    counter.end(first)
    clock.now_s += 3_600
    second = counter.begin()
    clock.every(0.9, partial(counter.land, second), partial(counter.end, second))
    assert counter.finish(second)
    assert counter.finish(first)
