"""A simulated cluster's queues, caches and pool (`kvstore.simulate.route_cluster`, `route`)."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.errors import BadInput
from kvstore.directory.lru import Lru
from kvstore.directory.policy import BlockKey
from kvstore.simulate.formats import read_trace
from kvstore.simulate.prices import Prices
from kvstore.simulate.route import Setup, replay_route
from kvstore.simulate.route_cluster import Cluster, Job, Rates
from kvstore.simulate.route_plain import Exact, Plain, RoundRobin
from kvstore.simulate.route_routers import make_router
from kvstore.simulate.trace import TraceRequest
from tests.sim.traces import sample, shared, trace_of

SIZE = 16
RATES = Rates(linear_s=0.01, quadratic_s=0.0, load_s=0.001, decode_s=0.5)


class Diary:
    """Hears of jobs and writes them down."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def first_token(self, job: Job) -> None:
        self.told.append(("first", job.number))

    def ended(self, job: Job) -> None:
        self.told.append(("ended", job.number))


def _cluster(
    workers: int = 2,
    blocks: int = 8,
    pool: int = 0,
    *,
    rates: Rates = RATES,
    overlapped: bool = True,
) -> Cluster:
    return Cluster(
        workers=workers, worker_blocks=blocks, pool_blocks=pool, block_tokens=SIZE,
        block_bytes=1, rates=rates, overlapped=overlapped, make=Lru,
    )  # fmt: skip


def _request(*blocks: int, at_ms: float = 0.0, output: int = 1) -> TraceRequest:
    return TraceRequest(at_ms, SIZE * len(blocks), output, [BlockKey(b) for b in blocks])


def test_prompts_are_computed_one_after_another() -> None:
    cluster, diary = _cluster(), Diary()
    first = cluster.send(_request(1, 2), 0)
    second = cluster.send(_request(3), 0)
    assert cluster.workers[0].wait_s(0.0) == pytest.approx(0.32 + 0.16)
    assert (cluster.workers[0].waiting, cluster.workers[0].uncached_tokens) == (2, 48)
    cluster.advance(10_000.0, diary)
    assert first.first_ms == pytest.approx(320) and first.end_ms == pytest.approx(820)
    assert second.start_ms == pytest.approx(320) and second.ttft_s == pytest.approx(0.48)
    assert diary.told == [("first", 0), ("first", 1), ("ended", 0), ("ended", 1)]
    worker = cluster.workers[0]
    assert (worker.waiting, worker.in_flight, worker.uncached_tokens, worker.kv_tokens) == (0,) * 4
    assert worker.busy_s == pytest.approx(0.48)


def test_a_prompt_hits_what_the_queue_before_it_will_have_cached() -> None:
    cluster = _cluster()
    cluster.send(_request(1, 2), 0)
    assert cluster.depths(_request(1, 2, 3).blocks) == [2, 0]
    job = cluster.send(_request(1, 2, 3), 0)
    assert (job.service.own_tokens, job.service.computed_tokens) == (32, 16)
    assert cluster.send(_request(1, 2, 3), 1).service.own_tokens == 0


def test_one_token_at_least_is_computed() -> None:
    cluster = _cluster()
    cluster.send(_request(1, 2), 0)
    assert cluster.send(_request(1, 2), 0).service.computed_tokens == 1


def test_evicted_blocks_are_held_no_longer() -> None:
    cluster = _cluster(blocks=2)
    cluster.send(_request(1, 2), 0)
    job = cluster.send(_request(3, 4), 0)
    assert set(job.dropped) == {1, 2} and job.stored == [3, 4]
    assert cluster.depths(_request(1, 2).blocks) == [0, 0]
    assert cluster.depths(_request(3, 4).blocks) == [2, 0]


def test_the_pool_has_what_is_computed_and_not_before() -> None:
    cluster, diary = _cluster(pool=8), Diary()
    cluster.send(_request(1, 2), 0)
    assert cluster.services(_request(1, 2, 3), [0, 0])[1].loaded_tokens == 0
    cluster.advance(400.0, diary)
    service = cluster.services(_request(1, 2, 3), [0, 0])[1]
    assert (service.loaded_tokens, service.computed_tokens) == (32, 16)
    assert service.load_s == pytest.approx(0.032)


@pytest.mark.parametrize(("overlapped", "busy_s"), [(True, 0.16), (False, 0.192)])
def test_a_load_hides_behind_the_queue(overlapped: bool, busy_s: float) -> None:
    cluster, diary = _cluster(pool=8, overlapped=overlapped), Diary()
    cluster.send(_request(1, 2), 0)
    cluster.advance(400.0, diary)
    cluster.send(_request(7, 8, 9, at_ms=400.0), 1)
    job = cluster.send(_request(1, 2, 3, at_ms=400.0), 1)
    cluster.advance(9_000.0, diary)
    assert job.busy_s == pytest.approx(busy_s)
    assert job.ttft_s == pytest.approx(0.48 + busy_s)


def test_blocks_that_load_slower_than_they_compute_are_computed() -> None:
    # At position p a token computes in 0.5 + p / 64 s and loads in 1.25 s: as quickly at 48.
    rates = Rates(linear_s=0.5, quadratic_s=1 / 64, load_s=1.25, decode_s=0.0)
    cluster, diary = _cluster(pool=8, rates=rates), Diary()
    request = _request(1, 2, 3, 4, 5)
    cluster.send(request, 0)
    cluster.advance(1e6, diary)
    (service, _) = cluster.services(request, [0, 0])
    assert service.loaded_tokens == 79 - 48
    computed = rates.compute_s(0, 48) + rates.compute_s(79, 80)
    assert service.compute_s == pytest.approx(computed)


@given(st.integers(0, 100_000), st.integers(1, 100_000))
def test_a_slower_worker_computes_as_much_slower(start: int, tokens: int) -> None:
    rates = Rates.of(Prices(), factor=3.0, decode_s=0.0)
    expected = 3 * Prices().compute_s(tokens, start)
    assert rates.compute_s(start, start + tokens) == pytest.approx(expected)


def test_without_a_pool_the_reference_foresees_every_time_to_first_token() -> None:
    trace = read_trace(sample("lmcache_agent"), limit=200)

    seen: list[float] = []
    came: list[float] = []

    class Foreseeing(Exact):
        def choose(self, request: TraceRequest) -> int:
            at = super().choose(request)
            services = self.cluster.services(request, self.cluster.depths(request.blocks))
            times = [self.cluster.ttft_s(i, s) for i, s in enumerate(services)]
            assert times[at] == min(times)
            seen.append(times[at])
            return at

        def first_token(self, job: Job) -> None:
            came.append(job.ttft_s)

    replay_route(trace, Setup(workers=3, factor=20.0), lambda cluster, *_: Foreseeing(cluster))
    assert len(came) == len(trace.requests)
    assert sorted(came) == pytest.approx(sorted(seen))


def test_a_replay_reports_shares_balance_and_times() -> None:
    trace = trace_of([[1, 2], [1, 2], [3], [4]], block_tokens=SIZE)

    class First(Plain):
        def choose(self, request: TraceRequest) -> int:
            return 0

    setup = Setup(workers=2, capacity=1.0, prices=Prices(prefill_tokens_per_s=1_000.0))
    result = replay_route(trace, setup, lambda cluster, *_: First(cluster))
    assert result.token_hit == pytest.approx(31 / 96)
    assert (result.pool_hit, result.imbalance) == (0.0, 2.0)
    assert result.ttft_p50_s == pytest.approx(0.016, rel=0.01)
    assert result.ttft_p99_s == pytest.approx(0.032, rel=0.01)
    assert result.utilisation == pytest.approx((0.032 + 0.001 + 0.016 * 2) / 2 / 3, rel=0.01)


def test_the_slower_the_workers_the_longer_the_wait() -> None:
    trace = read_trace(sample("lmcache_agent"))
    fast, slow = (
        replay_route(trace, Setup(workers=2, factor=factor), lambda c, *_: RoundRobin(c))
        for factor in (1.0, 4.0)
    )
    # Round robin decides the same at any rate, so its hits are the same too.
    assert fast.token_hit == slow.token_hit
    assert slow.utilisation == pytest.approx(4 * fast.utilisation)
    assert slow.ttft_mean_s > 4 * fast.ttft_mean_s * 0.99


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"workers": 0}, "0 workers"),
        ({"workers": 5_000}, "5000 workers"),
        ({"capacity": 0.0}, "capacity 0.0"),
        ({"pool": 1.5}, "pool 1.5"),
        ({"factor": 0.0}, "factor"),
        ({"report_ms": math.nan}, "report_ms"),
        ({"delay_ms": -1.0}, "delay_ms"),
    ],
)
def test_a_setup_that_makes_no_sense_is_refused(knobs: dict[str, float], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        Setup(**knobs)  # type: ignore[arg-type]


# Hit and mean seconds to the first token, from an earlier simulator on the same trace: agents, 8
# workers, flat prefill, LRU, workers so slow that sticky sessions keep them busy half of the time.
EARLIER = {
    ("round_robin", 0.0): (43.0, 25_104),
    ("sticky", 0.0): (94.3, 236),
    ("exact", 0.0): (91.3, 143),
    ("sticky", 0.5): (94.3, 47),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pool"), list(EARLIER))
def test_agents_agree_with_an_earlier_simulator(name: str, pool: float) -> None:
    path = shared("weka_cc_a")
    if path is None:
        pytest.skip("the full trace is not beside this checkout")
    trace = read_trace(path)
    prices = Prices(doubling_tokens=1e15, pool_gb_per_s=40.0)
    setup = Setup(policy="lru", prices=prices, overlapped=False)
    factor = 0.5 / replay_route(trace, setup, make_router("sticky")).utilisation
    setup = Setup(policy="lru", prices=prices, overlapped=False, factor=factor, pool=pool)
    result = replay_route(trace, setup, make_router(name))
    hit, ttft_s = EARLIER[name, pool]
    assert result.token_hit * 100 == pytest.approx(hit, abs=0.3)
    assert result.ttft_mean_s == pytest.approx(ttft_s, rel=0.12)
