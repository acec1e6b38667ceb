"""A cluster's tiers in simulation (`kvstore.simulate.hierarchy`, `tiers`, `prices`)."""

import random
from collections import Counter
from typing import Any

import pytest

from kvstore.core.errors import BadInput
from kvstore.directory.lru import Lru
from kvstore.directory.policy import BlockKey
from kvstore.router.score import Pace
from kvstore.simulate.formats import read_trace
from kvstore.simulate.hierarchy import Hierarchy, Shape
from kvstore.simulate.prices import DRAM, HBM, NVME, PEER, POOL, Prices
from kvstore.simulate.replay import replay
from kvstore.simulate.tiers import Fractions, replay_tiers
from kvstore.simulate.trace import TraceRequest
from tests.sim.traces import sample, trace_of

SIZE = 1_000


class Cluster:
    """A hierarchy that is asked by lists of numbers; remembers what it has seen."""

    def __init__(self, **shape: int | bool) -> None:
        self.tree = Hierarchy(Shape(**shape), Lru, SIZE)  # type: ignore[arg-type]
        self.now_ms = 0.0
        self.seen: set[BlockKey] = set()

    def ask(self, *numbers: int, host: int = 0, worker: int = 0) -> list[str | None]:
        """Serve a prompt; returns where each block came from."""
        self.now_ms += 1
        blocks = [BlockKey(number) for number in numbers]
        at = self.tree.hosts[host]
        sources: list[str | None] = []
        for block in blocks:
            sources.append(self.tree.find(at, worker, block) if None not in sources else None)
        request = TraceRequest(self.now_ms, 16 * len(blocks), 1, blocks)
        self.tree.serve(at, worker, request, sources)
        self.seen.update(blocks)
        return sources

    def moved(self) -> dict[str, int]:
        return {crossing: size // SIZE for crossing, size in self.tree.moved.items()}


def test_a_new_block_goes_to_hbm_and_at_once_to_dram() -> None:
    cluster = Cluster(hbm_blocks=4, dram_blocks=4)
    assert cluster.ask(1, 2) == [None, None]
    assert cluster.moved() == {"hbm>dram": 2}
    assert cluster.ask(1, 2) == [HBM, HBM]
    assert cluster.moved() == {"hbm>dram": 2}


def test_workers_of_a_host_share_its_dram() -> None:
    cluster = Cluster(workers=2, hbm_blocks=4, dram_blocks=4)
    cluster.ask(1, 2, worker=0)
    assert cluster.ask(1, 2, worker=1) == [DRAM, DRAM]
    assert cluster.moved() == {"hbm>dram": 2, "dram>hbm": 2}


def test_what_exactly_one_hbm_lists_is_drams_first_victim() -> None:
    cluster = Cluster(workers=2, hbm_blocks=4, dram_blocks=3)
    cluster.ask(1, worker=0)
    cluster.ask(1, worker=1)  # two list it
    cluster.ask(2, worker=0)  # one lists it, and it is younger
    cluster.ask(3, 4, worker=1)
    dram = cluster.tree.hosts[0].dram
    assert dram.held == {1, 3, 4}
    assert set(dram.kept) == {3, 4}


def test_the_last_copy_in_hbm_is_written_back() -> None:
    cluster = Cluster(hbm_blocks=2, dram_blocks=2)
    cluster.ask(1)
    cluster.ask(2)
    cluster.ask(3)  # DRAM drops 1, which HBM has; then HBM drops 1: back to DRAM in place of 2
    host = cluster.tree.hosts[0]
    assert host.hbms[0].held == {2, 3}
    assert 1 in host.dram.held
    assert cluster.moved() == {"hbm>dram": 4}


def test_nvme_is_written_once_and_keeps_its_copy() -> None:
    cluster = Cluster(hbm_blocks=1, dram_blocks=1, nvme_blocks=10)
    for _ in range(5):
        for number in (1, 2, 3):
            cluster.ask(number)
    moved = cluster.moved()
    assert moved["nvme>dram"] > 3
    assert moved.get("dram>nvme", 0) + moved.get("hbm>nvme", 0) == 3
    nvme = cluster.tree.hosts[0].nvme
    assert nvme is not None and nvme.held == {1, 2, 3}


class Refusing(Lru):
    """Thinks every newcomer worth less than what is held."""

    def victims(self, count: int, **options: Any) -> list[BlockKey]:
        return [] if options.get("newcomers") else super().victims(count, **options)


def test_only_the_lowest_tier_keeps_newcomers_out() -> None:
    """What DRAM refuses would be lost to an NVMe that has room for it."""
    alone = Hierarchy(Shape(hbm_blocks=1, dram_blocks=2), Refusing, 1)
    over = Hierarchy(Shape(hbm_blocks=1, dram_blocks=2, nvme_blocks=8), Refusing, 1)
    for tree in (alone, over):
        host = tree.hosts[0]
        for number in range(1, 9):
            request = TraceRequest(number, 512, 1, [BlockKey(number)])
            tree.serve(host, 0, request, [tree.find(host, 0, BlockKey(number))])
    assert len(alone.hosts[0].dram.held | alone.hosts[0].hbms[0].held) <= 3
    host = over.hosts[0]
    assert host.nvme is not None
    assert host.hbms[0].held | host.dram.held | host.nvme.held == set(range(1, 9))


def test_peers_are_read_only_where_hosts_are_peers() -> None:
    for peers, expected in ((True, PEER), (False, None)):
        cluster = Cluster(hosts=2, hbm_blocks=2, dram_blocks=2, peers=peers)
        cluster.ask(1, host=0)
        assert cluster.ask(1, host=1) == [expected]
        assert cluster.moved().get("peer>dram", 0) == int(peers)


def test_the_pool_takes_last_copies_once_and_serves_every_host() -> None:
    cluster = Cluster(hosts=2, hbm_blocks=1, dram_blocks=1, nvme_blocks=1, pool_blocks=10)
    for number in range(6):
        cluster.ask(number, host=0)
    assert cluster.ask(0, host=1) == [POOL]
    assert cluster.tree.pool is not None and 0 in cluster.tree.pool.held
    before = cluster.moved()["nvme>pool"]
    cluster.ask(0, host=0)
    for number in range(10, 16):
        cluster.ask(number, host=0)
    assert cluster.moved()["nvme>pool"] <= before + 6


@pytest.mark.parametrize("seed", range(8))
def test_books_agree_with_the_tiers_and_nothing_is_lost_while_there_is_room(seed: int) -> None:
    dice = random.Random(seed)
    peers = bool(seed % 2)
    cluster = Cluster(
        hosts=3, workers=2, hbm_blocks=5, dram_blocks=7, nvme_blocks=1_000, peers=peers
    )
    tree = cluster.tree
    for _ in range(200):
        stem = dice.randrange(6)
        path = [stem * 100 + depth for depth in range(dice.randint(1, 5))]
        cluster.ask(*path, host=dice.randrange(3), worker=dice.randrange(2))
        for host in tree.hosts:
            assert host.nvme is not None
            assert len(host.dram.held) <= 7 and all(len(hbm.held) <= 5 for hbm in host.hbms)
            for tier in (*host.hbms, host.dram, host.nvme):
                assert len(tier.policy) == len(tier.held)
            assert host.listed == Counter(b for hbm in host.hbms for b in hbm.held)
            kept = {b for b, count in host.listed.items() if count == 1 and b in host.dram.held}
            assert set(host.dram.kept) == kept
            for block in cluster.seen:
                assert host.below_hbm(block) == bool(tree._at.get(block, 0) >> host.number & 1)
        for block in cluster.seen:
            assert any(h.below_hbm(block) or h.listed[block] for h in tree.hosts)


def test_one_large_dram_hits_what_one_tier_does() -> None:
    """With HBM of one block, nothing below and prompts that fit, only DRAM's policy decides."""
    trace = read_trace(sample("mooncake_conversation"), limit=400)
    shape = Shape(hbm_blocks=1, dram_blocks=trace.unique_blocks)
    result = replay_tiers(trace, shape, Lru, Prices())
    single = replay(trace, Lru(), trace.unique_blocks)
    assert result.token_hit == pytest.approx(single.token_hit)


def test_seconds_are_those_of_the_routers_model() -> None:
    prices = Prices(prefill_tokens_per_s=1_000.0, doubling_tokens=2_000.0)
    assert prices.compute_s(100, 300) == Pace(1e-3, 5e-7).between(300, 400)
    trace = trace_of([[1, 2], [1, 2]])
    result = replay_tiers(trace, Shape(hbm_blocks=1, dram_blocks=4), Lru, prices)
    once = prices.compute_s(16, 0) + prices.compute_s(16, 16)
    load_s = prices.load_s(DRAM, 16 * prices.bytes_per_token)
    assert result.compute_s == pytest.approx(2 * once)
    assert result.load_s == pytest.approx(load_s)
    assert result.saved_s == pytest.approx(once - load_s)
    assert result.hit == {HBM: 0.25, DRAM: 0.25, NVME: 0.0, PEER: 0.0, POOL: 0.0}


def test_what_is_cheaper_to_compute_is_not_loaded() -> None:
    slow = Prices(dram_gb_per_s=1e-6)
    result = replay_tiers(trace_of([[1, 2]] * 2), Shape(hbm_blocks=1, dram_blocks=4), Lru, slow)
    assert (result.hit[DRAM], result.declined) == (0.0, 0.25)
    assert result.load_s == 0.0


def test_a_session_stays_with_its_worker() -> None:
    blocks = [BlockKey(1)]
    made = trace_of([[1]])
    for session, hbm in (("chat", 0.75), ("", 0.0)):
        requests = [TraceRequest(float(at), 16, 1, blocks, session) for at in range(4)]
        trace = type(made)("made", 16, requests)
        shape = Shape(workers=4, hbm_blocks=1, dram_blocks=1)
        assert replay_tiers(trace, shape, Lru, Prices()).hit[HBM] == hbm


def test_fractions_are_of_the_whole_cluster() -> None:
    trace = trace_of([range(1_000)])
    shape = Fractions(hbm=0.08, dram=0.2, nvme=0.0, pool=0.5).shape(
        trace, hosts=2, workers=4, peers=False
    )
    assert (shape.hbm_blocks, shape.dram_blocks, shape.nvme_blocks) == (10, 100, 0)
    assert shape.pool_blocks == 500


def test_senseless_shapes_and_prices_are_refused() -> None:
    with pytest.raises(BadInput, match="dram_blocks is 0"):
        Shape(hbm_blocks=1, dram_blocks=0)
    with pytest.raises(BadInput, match="nvme_gb_per_s is 0"):
        Prices(nvme_gb_per_s=0)
    with pytest.raises(BadInput, match="0 nodes"):
        Fractions().shape(trace_of([[1]]), hosts=0, workers=1, peers=False)
