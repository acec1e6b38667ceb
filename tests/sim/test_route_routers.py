"""Simulated routers (`route_plain`, `route_peers`, `route_ours` of `kvstore.simulate`)."""

from dataclasses import replace

import pytest

from kvstore.directory.policy import BlockKey
from kvstore.simulate.formats import read_trace
from kvstore.simulate.route import Setup, replay_route
from kvstore.simulate.route_cluster import Cluster, Job
from kvstore.simulate.route_ours import Ours
from kvstore.simulate.route_peers import (
    Aibrix,
    Dynamo,
    DynamoPrefill,
    LlmD,
    LMetric,
    Mooncake,
    Preble,
    ProductionStack,
    Sglang,
)
from kvstore.simulate.route_plain import (
    Affinity,
    Exact,
    LeastLoaded,
    LeastRequests,
    LongestPrefix,
    Plain,
    Random,
    RoundRobin,
    Sticky,
)
from kvstore.simulate.route_routers import make_router, router_names
from kvstore.simulate.trace import Trace, TraceRequest
from tests.sim.traces import sample, trace_of

SIZE = 16


def _cluster(workers: int = 2, pool: float = 0.0) -> Cluster:
    trace = trace_of([range(100)], block_tokens=SIZE)
    return Setup(workers=workers, capacity=1.0, pool=pool, policy="lru", factor=100.0).cluster(
        trace
    )


def _request(*blocks: int, session: str = "") -> TraceRequest:
    keys = [BlockKey(block) for block in blocks]
    return TraceRequest(0.0, SIZE * len(blocks), 1, keys, session=session)


def _run(router: Plain, request: TraceRequest) -> int:
    """Route one request and queue it."""
    at = router.choose(request)
    router.sent(router.cluster.send(request, at))
    return at


def test_round_robin_goes_round() -> None:
    router = RoundRobin(_cluster(3))
    assert [_run(router, _request(at)) for at in range(4)] == [0, 1, 2, 0]


def test_random_is_the_same_every_time_and_reaches_all() -> None:
    first, second = (
        [_run(router, _request(at)) for at in range(40)]
        for router in (Random(_cluster(3)), Random(_cluster(3)))
    )
    assert first == second and set(first) == {0, 1, 2}


def test_least_loaded_counts_seconds_and_least_requests_requests() -> None:
    cluster = _cluster()
    cluster.send(_request(*range(10)), 0)
    for at in range(2):
        cluster.send(_request(50 + at), 1)
    assert LeastLoaded(cluster).choose(_request(99)) == 1
    assert LeastRequests(cluster).choose(_request(99)) == 0


def test_affinity_looks_at_four_blocks_and_sticky_at_the_session() -> None:
    affinity, sticky = Affinity(_cluster(7)), Sticky(_cluster(7))
    assert affinity.choose(_request(1, 2, 3, 4, 5)) == affinity.choose(_request(1, 2, 3, 4, 6))
    assert len({affinity.choose(_request(1, 2, 3, last)) for last in range(7)}) == 7
    assert sticky.choose(_request(1, session="a")) == sticky.choose(_request(9, session="a"))
    assert len({sticky.choose(_request(1, session=str(n))) for n in range(40)}) == 7
    assert [sticky.choose(_request(1)) for _ in range(3)] == [0, 1, 2]


def test_longest_prefix_takes_the_free_one_of_equals() -> None:
    cluster = _cluster(3)
    cluster.send(_request(1, 2), 1)
    router = LongestPrefix(cluster)
    assert router.choose(_request(1, 2, 3)) == 1
    assert router.choose(_request(7)) == 0


def test_exact_weighs_queue_against_recompute() -> None:
    cluster = _cluster()
    cluster.send(_request(1, 2, 3), 0)
    # Behind three blocks of queue only the hit of three is as good as computing them.
    assert Exact(cluster).choose(_request(1, 2, 3, 4)) == 0
    cluster.send(_request(20, 21), 0)
    assert Exact(cluster).choose(_request(1, 2, 3, 4)) == 1


def test_dynamo_adds_prefill_and_decode_blocks() -> None:
    cluster = _cluster()
    cluster.send(_request(1, 2, 3, 4, 5), 0)
    # Worker 0: 5 to compute + 6 - 5 cached, 5 in flight: 11. Worker 1: 6 to compute: 6.
    assert Dynamo(cluster).choose(_request(1, 2, 3, 4, 5, 6)) == 1
    cluster.advance(1e9, Dynamo(cluster))
    cluster.send(_request(30, 31, 32, 33, 34, 35, 36), 0)
    cluster.advance(cluster.now_ms + 1e-6, Dynamo(cluster))
    router = Dynamo(cluster)
    assert router.prefill_blocks(_request(1, 2, 3, 4, 5, 6)) == pytest.approx([7 + 1, 6])


def test_dynamo_counts_half_of_what_a_shared_tier_has() -> None:
    cluster = _cluster(pool=1.0)
    cluster.send(_request(1, 2, 3, 4), 0)
    router = Dynamo(cluster)
    cluster.advance(1e9, router)
    assert router.prefill_blocks(_request(1, 2, 3, 4, 5, 6)) == pytest.approx([2, 4])


def test_a_heavier_prefill_weight_prefers_the_cache() -> None:
    cluster = _cluster()
    cluster.send(TraceRequest(0.0, 3 * SIZE, 10**6, _request(1, 2, 3).blocks), 0)
    cluster.advance(1e6, Dynamo(cluster))  # it decodes for long
    # Cached 2 of 4 at worker 0, which has 3 blocks in flight: 2 + 3 against 4; with 4: 8 + 3, 16.
    assert Dynamo(cluster).choose(_request(1, 2, 8, 9)) == 1
    assert DynamoPrefill(cluster).choose(_request(1, 2, 8, 9)) == 0


def test_lmetric_multiplies_by_requests() -> None:
    cluster = _cluster()
    cluster.send(TraceRequest(0.0, 3 * SIZE, 10**6, _request(1, 2, 3).blocks), 0)
    cluster.advance(1e6, LMetric(cluster))
    assert LMetric(cluster).choose(_request(1, 7, 8, 9)) == 1  # 3 * 2 against 4 * 1
    assert LMetric(cluster).choose(_request(1, 2, 3, 9)) == 0  # 1 * 2 against 4 * 1


def test_llm_d_weighs_prefix_free_room_and_queue() -> None:
    cluster = _cluster()
    cluster.send(_request(1, 2, 3, 4), 0)
    # Nearly equal room: the queue's 2 points against 3 times the share that is cached.
    assert LlmD(cluster).choose(_request(1, 2, 3, 4, 5)) == 0
    assert LlmD(cluster).choose(_request(1, 7, 8, 9)) == 1


def test_aibrix_leaves_the_busy_out() -> None:
    cluster = _cluster(3)
    cluster.send(_request(1, 2), 0)
    assert Aibrix(cluster).choose(_request(1, 2)) == 1  # 1 request is above mean and deviation
    for at in (1, 2):
        cluster.send(_request(50 + at), at)
    assert Aibrix(cluster).choose(_request(1, 2)) == 0
    for number in range(9):
        cluster.send(_request(60 + number), 0)
    assert Aibrix(cluster).choose(_request(1, 2)) == 1


def test_production_stack_takes_the_first_that_has_nearly_all() -> None:
    cluster = _cluster(3)
    for at in (2, 1):
        cluster.send(_request(*range(10)), at)
    router = ProductionStack(cluster)
    assert router.choose(_request(*range(10), 11)) == 1
    long = _request(*range(10), *range(200, 330), session="s")
    assert router.choose(long) == router.choose(_request(*range(400, 530), session="s"))
    assert router.choose(_request(*range(400, 530))) == 0


def test_preble_stays_where_most_is_cached() -> None:
    router = Preble(_cluster())
    at = _run(router, _request(1, 2, 3, 4))
    for _ in range(3):
        assert _run(router, _request(1, 2, 3, 9)) == at
    assert _run(router, _request(1, 7, 8, 9)) != at
    router.cluster.advance(200_000.0, router)
    assert router.choose(_request(90)) == 0
    assert router._loads == pytest.approx([0, 0])  # all of it was sent too long ago


def test_sglang_remembers_what_it_sent_and_balances_when_far_apart() -> None:
    router = Sglang(_cluster())
    assert _run(router, _request(1, 2, 3)) == 0
    assert _run(router, _request(4, 5, 6)) == 1
    assert [_run(router, _request(1, 2, number)) for number in range(10, 74)] == [0] * 64
    assert router.cluster.workers[0].in_flight == 65
    assert _run(router, _request(1, 2, 80)) == 0  # 65 against 1 is 64 apart, not more
    assert _run(router, _request(1, 2, 81)) == 1
    assert _run(router, _request(1, 90, 91, 92)) == 1  # a quarter is no match


def test_sglang_forgets_only_when_its_tree_is_too_large() -> None:
    router = Sglang(_cluster())
    router._tree_blocks = 3
    for blocks in ((1, 2, 3), (4, 5, 6), (7, 8, 9)):
        _run(router, _request(*blocks))
    assert router.choose(_request(1, 2, 3)) == 0
    router.cluster.advance(130_000.0, router)
    router.choose(_request(50))
    assert [len(tree) for tree in router._trees] == [3 + 1, 3]  # and what was sent since


def test_mooncake_takes_the_pool_even_where_it_is_slow() -> None:
    trace = trace_of([range(100)], block_tokens=SIZE)
    setup = Setup(workers=2, capacity=1.0, pool=1.0, policy="lru")
    slow = replace(setup, prices=replace(setup.prices, pool_gb_per_s=0.1))
    cluster = slow.cluster(trace)
    cluster.send(_request(1, 2, 3, 4), 0)
    cluster.advance(1e9, Mooncake(cluster))
    cluster.send(_request(20, 21, 22, 23, 24, 25), 0)
    # The reference would compute at worker 1; Mooncake counts a transfer that takes far longer.
    assert Exact(cluster).choose(_request(1, 2, 3, 4, 5)) == 1
    assert Mooncake(cluster).choose(_request(1, 2, 3, 4, 5)) == 0


# -- ours --------------------------------------------------------------------------------------


def _replayed(name: str, trace: Trace, **knobs: float) -> float:
    setup = Setup(**{"workers": 4, "policy": "lru", **knobs})  # type: ignore[arg-type]
    return replay_route(trace, setup, make_router(name)).ttft_mean_s


def test_ours_follows_a_session_and_leaves_it_for_a_shorter_queue() -> None:
    trace = trace_of([range(100)], block_tokens=SIZE)
    setup = Setup(workers=2, capacity=1.0, policy="lru", factor=1_000.0)
    cluster = setup.cluster(trace)
    ours = Ours(cluster, setup, trace)

    def run(*blocks: int, at_ms: float) -> int:
        request = replace(_request(*blocks), timestamp_ms=at_ms)
        cluster.advance(at_ms, ours)
        at = ours.choose(request)
        ours.sent(cluster.send(request, at))
        return at

    first = run(1, 2, 3, 4, at_ms=0.0)
    assert run(50, at_ms=0.0) != first
    assert run(1, 2, 3, 4, 5, at_ms=60_000.0) == first
    chosen = [run(1, 2, 60 + number, at_ms=60_000.0) for number in range(10)]
    assert chosen[0] == first and set(chosen) == {0, 1}


def test_ours_knows_the_pool_by_its_events_alone() -> None:
    trace = trace_of([range(100)], block_tokens=SIZE)
    setup = Setup(workers=2, capacity=1.0, pool=1.0, policy="lru", delay_ms=10.0, factor=100.0)
    cluster = setup.cluster(trace)
    ours = Ours(cluster, setup, trace)
    request = _request(1, 2, 3, 4)
    at = ours.choose(request)
    job = cluster.send(request, at)
    ours.sent(job)
    after = replace(_request(1, 2, 3, 4, 5), timestamp_ms=1e6)
    for late, known in ((job.first_ms + 9.0, 0), (job.first_ms + 11.0, 4 * SIZE)):
        cluster.advance(late, ours)
        ours._hear(late)
        other = 1 - at
        (score,) = [
            score
            for score in ours.decide(replace(after, timestamp_ms=late)).scores
            if int(score.name) == other
        ]
        assert score.known_tokens == known


def test_ours_reports_the_rest_of_the_queue() -> None:
    trace = trace_of([range(100)], block_tokens=SIZE)
    setup = Setup(workers=1, capacity=1.0, policy="lru", factor=100.0)
    cluster = setup.cluster(trace)
    ours = Ours(cluster, setup, trace)
    jobs: list[Job] = []
    for blocks in (range(10), range(20, 30)):
        request = _request(*blocks)
        ours.choose(request)
        jobs.append(cluster.send(request, 0))
        ours.sent(jobs[-1])
    half_ms = jobs[0].first_ms / 2
    load = ours.load(jobs, half_ms)
    assert load.queued_tokens == pytest.approx(80 + 160, abs=1)
    assert (load.running, load.waiting) == (1, 1)
    assert load.prefill_linear_s == pytest.approx(cluster.rates.linear_s)


@pytest.mark.parametrize("pool", [0.0, 0.5])
def test_ours_is_nearly_as_good_as_the_reference(pool: float) -> None:
    trace = read_trace(sample("mooncake_conversation"), limit=600)
    knobs = {"pool": pool, "factor": 4.0}
    ours, exact = (_replayed(name, trace, **knobs) for name in ("ours", "exact"))
    assert ours <= 1.05 * exact
    assert ours < _replayed("dynamo", trace, **knobs)


def test_ours_gets_worse_by_old_news() -> None:
    trace = read_trace(sample("mooncake_conversation"), limit=600)
    knobs = {"pool": 0.0, "factor": 1.5}
    fresh, late, stale = (
        _replayed("ours", trace, delay_ms=delay_ms, **knobs)
        for delay_ms in (2.0, 5_000.0, 10_000.0)
    )
    assert 1.2 * fresh < late < stale


def test_ours_is_the_best_where_workers_are_overloaded_and_share_a_pool() -> None:
    """In bursts that queue for hours: work saved is worth more than a place further ahead."""
    trace = read_trace(sample("ragpulse"), limit=600)
    knobs = {"pool": 0.5, "factor": 4_000.0}
    ours = _replayed("ours", trace, **knobs)
    for name in ("exact", "lmetric", "llm_d", "least_loaded"):
        assert ours < _replayed(name, trace, **knobs), name


def test_ours_learns_that_loads_begin_with_the_turn() -> None:
    trace = read_trace(sample("mooncake_conversation"), limit=600)
    setup = Setup(workers=8, pool=0.5, policy="lru", factor=2.0, overlapped=False)
    routers: list[Ours] = []

    def make(cluster: Cluster, setup: Setup, trace: Trace) -> Ours:
        routers.append(Ours(cluster, setup, trace))
        return routers[-1]

    for overlapped in (False, True):
        replay_route(trace, replace(setup, overlapped=overlapped), make)
    serial, together = (
        [router._placement.learned.overlaps(f"{at:04d}") for at in range(8)] for router in routers
    )
    # Of one worker the last few answers may have been short loads behind long queues.
    assert sum(serial) <= 2 and sum(together) >= 6


def test_ours_keeps_up_among_more_workers_than_requests() -> None:
    trace = read_trace(sample("mooncake_conversation"), limit=200)
    knobs = {"pool": 0.0, "factor": 40.0, "workers": 300, "capacity": 4.0}
    ours, exact, lmetric = (
        _replayed(name, trace, **knobs) for name in ("ours", "exact", "lmetric")
    )
    assert ours <= 1.05 * exact and ours <= lmetric


@pytest.mark.parametrize("name", router_names())
def test_every_router_serves_every_request_of_every_trace(name: str) -> None:
    for of in ("mooncake_synthetic", "ragpulse"):
        trace = read_trace(sample(of), limit=100)
        result = replay_route(trace, Setup(workers=5, pool=0.3), make_router(name))
        assert 0 <= result.token_hit <= result.token_hit + result.pool_hit < 1
        assert result.imbalance >= 1 and 0 < result.ttft_p50_s <= result.ttft_p99_s
