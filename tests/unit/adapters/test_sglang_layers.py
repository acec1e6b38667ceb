"""The count of layers that the forward waits for: what lands, what fails, what never ends."""

import threading
import time

import pytest

from kvstore.adapters.sglang.layers import LayerCounter
from kvstore.core.errors import Unreachable


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
    second.join(10)
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
    forward.join(10)
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


def test_a_loader_that_does_not_move_costs_a_deadline_and_then_the_engine_is_told() -> None:
    counter = LayerCounter(2, stall_ms=20)
    index = counter.begin()
    counter.set_consumer(index)
    began = time.monotonic()
    counter.wait_until(0)
    assert 0.02 <= time.monotonic() - began < 5
    assert not counter.land(index)
    with pytest.raises(Unreachable, match="still writes"):
        counter.finish(index)


def test_no_load_is_no_wait_and_a_reset_lets_go() -> None:
    counter = LayerCounter(2, stall_ms=20_000)
    counter.wait_until(1)
    counter.set_consumer(-1)
    counter.wait_until(0)
    index = counter.begin()
    counter.set_consumer(index)
    forward = waiting(counter, 0)
    counter.reset()
    forward.join(10)
    assert not forward.is_alive()
    assert not counter.land(index)
    assert counter.begin() == 0
