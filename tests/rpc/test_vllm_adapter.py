"""The adapter's two halves against a real node, driven as vLLM's scheduler and worker do."""

import secrets
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvstore.adapters.vllm import link, scheduler_side
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_S, until_so
from tests.vllm_halves import Engine, Request


async def held_up(go_on: threading.Event) -> None:
    """Hold up the loop itself, as a busy processor does."""
    assert go_on.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=16 << 20) as running:
        yield running


@pytest.fixture
def engines(node: RunningNode) -> Iterator[tuple[Engine, Engine]]:
    both = Engine(str(node.run_dir), 1), Engine(str(node.run_dir), 2)
    until_so(lambda: all(engine.link.usable for engine in both))
    yield both
    for engine in both:
        engine.close()


def test_one_engine_loads_what_another_stored(engines: tuple[Engine, Engine]) -> None:
    one, two = engines
    one.compute_and_store("a", [5, 2, 7, 1])
    assert two.matched(Request("b")) == 96
    salted = Request("s", cache_salt="tenant")
    assert two.matched(salted) == 0, "another salt is another name"
    assert two.load(Request("b"), [0, 3, 6, 4]) == set()
    for ours, theirs in zip(one.layers, two.layers, strict=True):
        assert np.array_equal(ours[[5, 2, 7]], theirs[[0, 3, 6]])
        assert not np.array_equal(ours[1], theirs[4]), "a partial block has no name"
    assert two.worker.take_counts()["loaded_blocks_dram"] == 6
    assert two.scheduler.sources(Request("b"), 96) != {}
    assert two.scheduler.finished("b") is False, "what was loaded is not stored again"


def test_requests_that_arrive_together_start_in_one_step(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = engines
    asked: list[int] = []

    def patience_ns(*, running: int, step_ns: int) -> int:
        asked.append(running)
        return 0 if running else 8_000_000_000

    monkeypatch.setattr(scheduler_side, "patience_ns", patience_ns)
    one.step([], [])
    together = [Request(name, prompt_token_ids=list(range(9_000, 9_100))) for name in "de"]
    for request in together:
        one.scheduler.arrived(request)
    assert [one.scheduler.matched(request, 0)[0] for request in together] == [0, 0]
    assert one.scheduler.take_counts()["waited_ns"] > 0
    one.step([("d", 100), ("e", 100)], [0, 1, 2, 3])
    go_on = threading.Event()
    one.link.submit(held_up(go_on))
    late = Request("f", prompt_token_ids=list(range(9_500, 9_600)))
    assert one.scheduler.matched(late, 0) == (None, False), "two others would be kept waiting"
    go_on.set()
    one.scheduler.finished("d")
    one.step([("e", 101)], [0, 1, 2, 3])
    one.scheduler.finished("e")
    assert asked == [0, 2, 1, 0]
    assert one.scheduler.matched(late, 0)[0] == 0, "nobody is kept waiting any more"


def test_steps_without_work_rest_until_the_stores_have_ended(
    engines: tuple[Engine, Engine],
) -> None:
    one, _ = engines
    name, plan = next(
        (name, plan)
        for name in "uvw"
        if one.matched(Request(name, prompt_token_ids=list(range(3_000, 3_100)))) == 0
        and (plan := one.step([(name, 100)], [0, 1, 2, 3])).stores
    )
    assert one.scheduler.finished(name)
    steps = 0
    while name not in one.worker.ended({name})[0]:
        one.worker.rest(8.0)
        steps += 1
    assert len(plan.stores) == 1 and steps <= 2, "the engine spins beside the copies"


def test_an_engine_that_only_consumes_loads_and_stores_nothing(
    node: RunningNode, engines: tuple[Engine, Engine]
) -> None:
    one, _ = engines
    consumer = Engine(str(node.run_dir), 3, stores=False)
    until_so(lambda: consumer.link.usable)
    new = list(range(7_000, 7_100))
    assert consumer.matched(Request("n", prompt_token_ids=new)) == 0
    assert consumer.step([("n", 100)], [0, 1, 2, 3]).stores == []
    assert consumer.scheduler.finished("n") is False
    one.compute_and_store("a", [5, 2, 7, 1])
    assert consumer.load(Request("b"), [0, 3, 6, 4]) == set()
    assert consumer.scheduler.take_counts()["steps"] == 2
    consumer.close()


def test_a_request_that_its_tokens_do_not_name_is_left_alone(
    engines: tuple[Engine, Engine],
) -> None:
    one, _ = engines
    for request in (Request("l", lora_request=1), Request("m", mm_features=[1])):
        assert one.scheduler.matched(request, 0) == (0, False)
        assert one.step([(request.request_id, 100)], [0, 1, 2, 3]).stores == []


def test_a_cut_off_store_is_not_committed(engines: tuple[Engine, Engine]) -> None:
    one, two = engines
    tokens, go_on = list(range(500, 600)), threading.Event()

    assert one.matched(Request("p", prompt_token_ids=tokens)) == 0
    holding = one.link.submit(held_up(go_on))
    plan = one.scheduler.step(
        [("p", 100)], blocks_of=lambda _: [0, 1, 2, 3], preempted=(), scheduled_tokens=1
    )
    one.worker.store(plan.stores[0])
    one.worker.preempted(["p"])
    go_on.set()
    holding.result(PATIENCE_S)
    until_so(lambda: "p" in one.worker.ended({"p"})[0])
    assert two.matched(Request("t", prompt_token_ids=tokens)) == 0


def test_a_node_that_hangs_between_the_answer_and_the_load_costs_a_recompute(
    node: RunningNode, engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1_000.0
    monkeypatch.setattr(link, "time", SimpleNamespace(monotonic=lambda: now_s))
    one, two = engines[0], Engine(str(node.run_dir), 4, patience_ms=200)
    one.compute_and_store("a", [5, 2, 7, 1])

    known: list[Request] = []

    def found() -> bool:
        nonlocal now_s
        now_s += 1  # whatever a slow machine made it miss is forgotten
        known.append(Request(secrets.token_hex(4)))
        return two.matched(known[-1]) == 96

    until_so(found)
    request = known[-1]
    node.signal_node(signal.SIGSTOP)
    try:
        bad = two.load(request, [0, 3, 6, 4])
        assert bad == {0, 3, 6}
        assert two.matched(request) == 0, "a load that failed is not tried again"
        assert two.scheduler.matched(Request("later"), 0) == (0, False), "nobody waits"
    finally:
        node.signal_node(signal.SIGCONT)
    usable = [two.link.usable]
    now_s += 0.2
    assert [*usable, two.link.usable] == [False, True]
    until_so(lambda: found() and two.load(known[-1], [0, 3, 6, 4]) == set())
    two.close()


def test_an_engine_without_a_node_goes_on_and_uses_it_when_it_comes(tmp_path: Any) -> None:
    lonely = Engine(str(tmp_path / "nobody"), 3)
    try:
        assert lonely.scheduler.matched(Request("a"), 0) == (0, False)
        assert lonely.step([("a", 100)], [0, 1, 2, 3]).stores == []
        assert lonely.scheduler.finished("a") is False
        until_so(lambda: sum(lonely.link.failures.values()) > 0)
    finally:
        lonely.close()
