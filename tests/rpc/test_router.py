"""The router over real streams of scripted publishers."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput, Refused
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import BlockName, chain, pack_tokens
from kvstore.directory.events import Loaded, TierKind
from kvstore.directory.view import Health
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.learning import Actual
from kvstore.router.members import Member, Members
from kvstore.router.placement import Prompt, Step
from kvstore.router.router import Router, RouterConfig
from tests.patience import PATIENCE_MS, until
from tests.processes import scripted
from tests.scripted_worker import ROOT, ScriptedWorker

TOKENS = 20 * BLOCK_TOKENS + 5
NAMES = list(chain(ROOT, pack_tokens(range(TOKENS))))
PROMPT = Prompt(ROOT, NAMES, TOKENS)
Start = Callable[..., Awaitable[ScriptedWorker]]
CONFIG = RouterConfig(wait_ms=PATIENCE_MS, resync_pause_ms=20)
CONFIG_HOLD_TOKENS = 6_000
"""Six seconds of work at 1,000 tokens a second: more than `hold_ms`."""


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
async def router(registry: CollectorRegistry) -> AsyncIterator[Router]:
    async with Router(metrics=RouterMetrics(registry), config=CONFIG) as router:
        yield router


@pytest.fixture
async def cluster() -> AsyncIterator[Start]:
    started: list[ScriptedWorker] = []

    async def start(name: str, **settings: object) -> ScriptedWorker:
        worker = ScriptedWorker(name, **settings)  # type: ignore[arg-type]
        await worker.start()
        started.append(worker)
        return worker

    yield start
    for worker in started:
        await worker.stop()


def member(publisher: ScriptedWorker) -> Member:
    kind = "worker" if publisher.tier is TierKind.HBM else "node"
    return Member(kind, publisher.name, publisher.address)  # type: ignore[arg-type]


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until the router's view, which others change, satisfies `condition`."""
    try:
        await until(condition)
    except TimeoutError:
        pytest.fail(f"never: {what}")


def hits(router: Router, names: list[BlockName] = NAMES) -> dict[str, int]:
    try:
        scores = router.explain(Prompt(ROOT, names, TOKENS)).scores
    except Refused:
        return {}
    return {score.name: score.hit_tokens for score in scores}


async def test_a_prompt_goes_where_its_prefix_is(router: Router, cluster: Start) -> None:
    first = await cluster("a")
    second = await cluster("b")
    second.hold(NAMES[:12])
    router.set_members(Members.of([member(first), member(second)]))
    await eventually(lambda: hits(router) == {"a": 0, "b": 192}, "b's prefix is known")
    decision = await router.route(PROMPT)
    assert (decision.worker, decision.address) == ("b", second.address)
    assert decision.hit_tokens == 192
    assert decision.plan == (Step(0, 12, TierKind.HBM, "b"),)
    assert decision.predicted_ttft_ms == pytest.approx(TOKENS - 192, rel=0.01)
    assert "192 tokens cached" in decision.explanation
    assert router.complete(decision.booking, actual=Actual(hit_tokens=192))
    assert not router.complete(decision.booking)
    second.drop(NAMES[4:12])
    await eventually(lambda: hits(router)["b"] == 64, "the eviction is known")


async def test_workers_reach_their_host_s_node(router: Router, cluster: Start) -> None:
    here = await cluster("here", host="host-a")
    there = await cluster("there", host="host-b")
    node = await cluster("node-a", tier=TierKind.DRAM, host="host-a")
    node.hold(NAMES[:10])
    here.hold(NAMES[:2])
    router.set_members(Members.of([member(here), member(there), member(node)]))
    await eventually(lambda: hits(router) == {"here": 160, "there": 0}, "the node's blocks count")
    assert router.explain(PROMPT).plan == (
        Step(0, 2, TierKind.HBM, "here"),
        Step(2, 8, TierKind.DRAM, "host-a"),
    )


async def test_requests_that_share_a_prefix_follow_the_one_computing_it(
    router: Router, cluster: Start
) -> None:
    workers = [await cluster(name) for name in "abc"]
    router.set_members(Members.of(member(worker) for worker in workers))
    await eventually(lambda: len(hits(router)) == 3, "all workers live")
    first = await router.route(PROMPT)
    assert first.hit_tokens == 0
    again = router.explain(PROMPT)
    # It has to queue behind the one that computes, which still beats computing all of it twice.
    assert {s.name: s.hit_tokens for s in again.scores}[first.worker] == 320
    other = await router.route(Prompt(ROOT, [], 400))
    assert other.worker != first.worker, "an unrelated prompt avoids the queue"


async def test_nobody_follows_a_request_that_keeps_nothing(router: Router, cluster: Start) -> None:
    router.set_members(Members.of([member(await cluster("a"))]))
    await eventually(lambda: hits(router) == {"a": 0}, "the worker is live")
    await router.route(replace(PROMPT, keeps=False))
    assert hits(router) == {"a": 0}
    await router.route(PROMPT)
    assert hits(router) == {"a": 320}


async def test_nothing_goes_to_the_dead_the_draining_the_excluded_or_the_failed(
    router: Router, cluster: Start
) -> None:
    workers = [await cluster(name) for name in "abcd"]
    workers[1].publisher.load = Loaded(draining=True)
    router.set_members(Members.of(member(worker) for worker in workers))
    await eventually(lambda: set(hits(router)) == {"a", "c", "d"}, "the others are live")
    await eventually(lambda: router.explain(PROMPT).excluded.get("b") == "draining", "b drains")
    decision = await router.route(Prompt(ROOT, [], 10, exclude={"a"}, among={"a", "b", "c"}))
    assert decision.worker == "c"
    assert decision.excluded == {
        "a": "excluded by the caller", "b": "draining", "d": "does not serve this model"
    }  # fmt: skip
    router.complete(decision.booking, failed=True)
    assert set(hits(router)) == {"a", "d"}
    await workers[0].stop()
    await eventually(lambda: set(hits(router)) <= {"c", "d"}, "a's end is noticed")
    assert router.health("a") is Health.LOST


async def test_a_stopped_worker_is_suspect_and_comes_back(router: Router) -> None:
    with scripted("w") as process:
        router.set_members(Members.of([Member("worker", "w", process.ready["address"])]))
        await eventually(lambda: hits(router) == {"w": 0}, "the worker is live")
        process.signal(signal.SIGSTOP)
        await eventually(lambda: hits(router) == {}, "its silence is noticed")
        assert router.health("w") is Health.SUSPECT
        assert router.silence_ms("w") > 1_000
        with pytest.raises(Refused) as refused:
            await router.route(PROMPT, wait_ms=10)
        assert refused.value.retry_after_ms > 0
        waiting = asyncio.create_task(router.route(PROMPT, wait_ms=PATIENCE_MS))
        process.signal(signal.SIGCONT)
        assert (await waiting).worker == "w"


async def test_a_restarted_worker_starts_with_empty_pages(router: Router) -> None:
    with scripted("w", "--hold", "4") as process:
        router.set_members(Members.of([Member("worker", "w", process.ready["address"])]))
        await eventually(lambda: hits(router) == {"w": 64}, "its pages are known")
        process.kill()
        await eventually(lambda: hits(router) == {}, "its end is noticed")
    with scripted("w", "--incarnation", "2") as process:
        address = str(process.ready["address"])
        router.set_members(Members.of([Member("worker", "w", address, "", 2)]))
        await eventually(lambda: hits(router) == {"w": 0}, "the new one is live")
        assert (await router.route(PROMPT)).address == address


async def test_members_that_leave_are_forgotten(
    router: Router, cluster: Start, registry: CollectorRegistry
) -> None:
    worker = await cluster("a")
    worker.hold(NAMES)
    router.set_members(Members.of([member(worker)]))
    await eventually(lambda: hits(router) == {"a": 320}, "the worker is live")
    router.set_members(Members())
    assert router.silence_ms("a") == 0.0
    await eventually(lambda: worker.publisher.subscribers == 0, "the subscription ends")
    await eventually(
        lambda: registry.get_sample_value("kvstore_view_blocks") == 0, "its blocks are swept"
    )
    with pytest.raises(Refused):
        await router.route(PROMPT, wait_ms=0)


async def test_a_hole_in_the_stream_is_followed_anew(
    router: Router, cluster: Start, registry: CollectorRegistry
) -> None:
    worker = await cluster("a")
    router.set_members(Members.of([member(worker)]))
    await eventually(lambda: hits(router) == {"a": 0}, "the worker is live")
    worker.hold(NAMES[:3])
    await eventually(lambda: hits(router) == {"a": 48}, "the blocks are known")
    # The view forgets what it heard, as if the message had been lost.
    place = router._view._publishers["a"].places[TierKind.HBM]
    router._view._index.discard(place, ROOT, NAMES[2:3])
    assert hits(router) == {"a": 32}
    await eventually(
        lambda: hits(router) == {"a": 48}, "the digest shows it and a snapshot heals it"
    )
    resyncs = registry.get_sample_value("kvstore_view_resyncs_total", {"reason": "digest"})
    assert resyncs == 1


async def test_closing_refuses_those_who_wait(registry: CollectorRegistry) -> None:
    router = Router(metrics=RouterMetrics(registry), config=CONFIG)
    router.set_members(Members.of([Member("worker", "w", "127.0.0.1:1")]))
    waiting = asyncio.create_task(router.route(PROMPT))
    await asyncio.sleep(0)
    await router.close()
    with pytest.raises(Refused):
        await waiting


def test_prompts_and_bounds_are_checked() -> None:
    with pytest.raises(BadInput, match="prompt of 0 tokens"):
        Prompt(ROOT, [], 0)
    with pytest.raises(BadInput, match="names for 16 tokens"):
        Prompt(ROOT, NAMES[:2], 16)
    with pytest.raises(BadInput, match="tick_ms"):
        RouterConfig(tick_ms=0)
    with pytest.raises(BadInput, match="wait_ms"):
        RouterConfig(wait_ms=-1)


async def test_a_first_token_ends_the_queue_and_corrects_the_rate(
    router: Router, cluster: Start, registry: CollectorRegistry
) -> None:
    router.set_members(Members.of([member(await cluster("a"))]))
    await eventually(lambda: hits(router) == {"a": 0}, "the worker is live")
    first = await router.route(Prompt(ROOT, [], 1_000))
    assert router.explain(PROMPT).scores[0].queued_tokens == 1_000
    assert router.first_token(first.booking, Actual(hit_tokens=0, ttft_ms=3_000))
    assert not router.first_token(first.booking + 1, Actual(hit_tokens=0))
    after = router.explain(Prompt(ROOT, [], 1_000))
    assert after.scores[0].queued_tokens == 0
    assert after.predicted_ttft_ms == pytest.approx(3_000, rel=0.01)
    assert router.complete(first.booking, actual=Actual(hit_tokens=0, ttft_ms=9_000))
    again = router.explain(Prompt(ROOT, [], 1_000))
    assert again.predicted_ttft_ms == after.predicted_ttft_ms, "one answer teaches once"
    errors = registry.get_sample_value("kvstore_predicted_ttft_error_seconds_sum")
    assert errors == pytest.approx(2.0, rel=0.02)


async def test_a_publisher_that_promises_too_much_is_believed_less(
    router: Router, cluster: Start, registry: CollectorRegistry
) -> None:
    worker = await cluster("a")
    worker.hold(NAMES)
    router.set_members(Members.of([member(worker)]))
    await eventually(lambda: hits(router) == {"a": 320}, "the worker is live")
    for _ in range(10):
        decision = await router.route(replace(PROMPT, keeps=False))
        assert router.complete(decision.booking, actual=Actual(hit_tokens=0))
    assert hits(router)["a"] < 64
    assert "a is believed 1" in router.explain(PROMPT).missed
    predicted = registry.get_sample_value("kvstore_routed_hit_tokens_total", {"kind": "predicted"})
    actual = registry.get_sample_value("kvstore_routed_hit_tokens_total", {"kind": "actual"})
    assert predicted is not None and predicted > 320 and actual == 0
    assert registry.get_sample_value("kvstore_false_hit_tokens_total") == predicted


async def test_a_decision_says_why_the_rest_has_to_be_computed(
    router: Router, cluster: Start
) -> None:
    near, far = await cluster("near"), await cluster("far", host="host-b")
    node = await cluster("node", tier=TierKind.FILES, host="host-b")
    near.hold(NAMES[:4])
    node.hold(NAMES[:9])
    far.publisher.load = Loaded(prefill_tokens_per_s=1_000.0, queued_tokens=10_000, waiting=5)
    router.set_members(Members.of([member(near), member(far), member(node)]))
    await eventually(lambda: hits(router) == {"near": 64, "far": 144}, "the prefixes are known")
    await eventually(lambda: router.explain(PROMPT).worker == "near", "far's queue is known")
    missed = router.explain(PROMPT).missed
    assert "far has 80 more and costs" in missed
    assert "176 tokens are cached nowhere in sight" in missed
    assert "the last 5 are always computed" in missed


async def busy(router: Router, cluster: Start, *, queued_tokens: int) -> ScriptedWorker:
    """One worker that computes 1,000 tokens a second and has so many to go."""
    worker = await cluster("busy")
    worker.publisher.load = Loaded(prefill_tokens_per_s=1_000.0, queued_tokens=queued_tokens)
    router.set_members(Members.of([member(worker)]))
    await eventually(lambda: hits(router) == {"busy": 0}, "the worker is live")
    await eventually(
        lambda: router.explain(PROMPT).scores[0].queued_tokens == queued_tokens, "its load is known"
    )
    return worker


async def settled(registry: CollectorRegistry, waiting: int) -> None:
    await eventually(
        lambda: registry.get_sample_value("kvstore_router_waiting") == waiting, f"{waiting} wait"
    )


async def test_requests_wait_in_order_until_a_worker_has_room(
    router: Router, cluster: Start, registry: CollectorRegistry
) -> None:
    worker = await busy(router, cluster, queued_tokens=CONFIG_HOLD_TOKENS)
    order: list[str] = []

    async def ask(name: str, priority: int) -> None:
        made = await router.route(Prompt(ROOT, [], 3_000, priority=priority))
        order.append(name)
        router.first_token(made.booking, Actual(hit_tokens=0))

    first = asyncio.create_task(ask("first", 0))
    await settled(registry, 1)
    second = asyncio.create_task(ask("urgent", 1))
    await settled(registry, 2)
    worker.publisher.load = Loaded(prefill_tokens_per_s=1_000.0)
    await asyncio.gather(first, second)
    assert order == ["urgent", "first"]
    assert registry.get_sample_value("kvstore_router_wait_seconds_count") == 2
    await settled(registry, 0)


async def test_a_request_that_nobody_can_serve_in_time_is_refused_with_a_time(
    router: Router, cluster: Start, registry: CollectorRegistry
) -> None:
    await busy(router, cluster, queued_tokens=CONFIG_HOLD_TOKENS)
    with pytest.raises(Refused, match="every worker has enough to do") as waited:
        await router.route(PROMPT, wait_ms=10, deadline_ms=30)
    assert waited.value.retry_after_ms >= 1_000
    with pytest.raises(Refused, match="enough to do"):
        await router.route(PROMPT, wait_ms=0, deadline_ms=0)
    with pytest.raises(Refused, match="1000 ms were asked for") as late:
        await router.route(replace(PROMPT, ttft_slo_ms=1_000.0))
    assert 5_000 < late.value.retry_after_ms < 6_000
    for reason, count in {"deadline": 2, "slo": 1}.items():
        assert count == registry.get_sample_value(
            "kvstore_router_refusals_total", {"reason": reason}
        )
    # One that failed elsewhere has had its turn.
    assert (await router.route(replace(PROMPT, exclude={"other"}))).worker == "busy"


async def test_a_full_queue_refuses_the_weakest_and_a_cancelled_waiter_leaves(
    cluster: Start, registry: CollectorRegistry
) -> None:
    config = replace(CONFIG, max_waiting=2, domain_weights={"paying": 2.0})
    async with Router(metrics=RouterMetrics(registry), config=config) as router:
        await busy(router, cluster, queued_tokens=CONFIG_HOLD_TOKENS)
        asked = [
            asyncio.create_task(router.route(Prompt(ROOT, [], 100, domain=domain)))
            for domain in ("free", "free", "paying")
        ]
        with pytest.raises(Refused, match="2 requests wait already") as full:
            await asked[1]
        assert full.value.retry_after_ms > 0
        asked[0].cancel()
        await settled(registry, 1)
        await router.close()
        with pytest.raises(Refused):
            await asked[2]
        with pytest.raises(Refused):
            await router.route(PROMPT)
    await settled(registry, 0)


async def test_domains_share_what_workers_can_do(router: Router, cluster: Start) -> None:
    worker = await busy(router, cluster, queued_tokens=CONFIG_HOLD_TOKENS)
    order: list[str] = []

    async def ask(domain: str) -> None:
        made = await router.route(Prompt(ROOT, [], 1_000, domain=domain))
        order.append(domain)
        router.complete(made.booking, actual=Actual(hit_tokens=0))

    asked = [asyncio.create_task(ask("greedy")) for _ in range(12)]
    await asyncio.sleep(0)
    asked += [asyncio.create_task(ask("modest")) for _ in range(4)]
    await asyncio.sleep(0)
    worker.publisher.load = Loaded(prefill_tokens_per_s=1_000.0)
    await asyncio.gather(*asked)
    assert order[:8].count("modest") == 4


def test_weights_are_checked() -> None:
    with pytest.raises(BadInput, match="weight of domain x is 0"):
        RouterConfig(domain_weights={"x": 0.0})
