from kvworkers.engine.output import FirstTokens
from kvworkers.engine.report import Reporter, batch_label
from kvworkers.engine.sequence import CacheUse
from kvworkers.pages.pool import PageKey, PagePool
from prometheus_client import CollectorRegistry

from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import MissReason
from kvstore.directory.events import Loaded, LoadRate, TierKind, WorkerRole
from kvstore.directory.lru import Lru
from kvstore.directory.publisher import Publisher
from kvstore.observe.metrics import WorkerMetrics

ROOTS = (Root(b"r" * 32), Root(b"\xf0" * 32))


def test_events_follow_the_pool_through_eviction() -> None:
    pool = PagePool(4, block_bytes=4096, policy=Lru())
    publisher = Publisher("w", 1, [TierKind.HBM], pool)
    registry = CollectorRegistry()
    reporter = Reporter(publisher, WorkerMetrics(registry))
    pages = pool.allocate(4, now_ms=0.0)
    assert pages is not None
    for n, page in enumerate(pages):
        key = PageKey(ROOTS[n // 2], BlockName(bytes([n + 1]) * 32))
        assert pool.publish(page, key, position=n, now_ms=0.0)
    reporter.publish(pool, Loaded(running=3))
    assert publisher.sequence == 4 and publisher.digests()[0].count == 4
    assert publisher.load == Loaded(running=3)
    pool.release(pages, now_ms=1.0)
    pool.allocate(3, now_ms=2.0)
    reporter.publish(pool, Loaded(kv_capacity_bytes=9))
    assert publisher.sequence == 7 and publisher.digests()[0].count == 1
    assert registry.get_sample_value("kvstore_worker_evicted_pages_total") == 3
    assert registry.get_sample_value("kvstore_worker_kv_capacity_bytes") == 9


def test_prompt_tokens_are_counted_by_source() -> None:
    registry = CollectorRegistry()
    publisher = Publisher("w", 1, [TierKind.HBM], PagePool(1, block_bytes=4096, policy=Lru()))
    reporter = Reporter(publisher, WorkerMetrics(registry))
    use = CacheUse(100, 32, {TierKind.DRAM: 48}, MissReason.ABSENT)
    reporter.first_token(FirstTokens(use, 50.0, 5.0, 2.0))
    for source, tokens in (("hbm", 32), ("dram", 48), ("computed", 20)):
        labels = {"source": source}
        assert registry.get_sample_value("kvstore_worker_prompt_tokens_total", labels) == tokens
    assert registry.get_sample_value("kvstore_worker_misses_total", {"reason": "absent"}) == 1


def test_decode_time_is_told_apart_by_batch() -> None:
    assert [batch_label(n) for n in (1, 2, 3, 4, 5, 16, 17)] == [
        "1",
        "2",
        "4",
        "4",
        "8",
        "16",
        "32",
    ]
    registry = CollectorRegistry()
    publisher = Publisher("w", 1, [TierKind.HBM], PagePool(1, block_bytes=4096, policy=Lru()))
    reporter = Reporter(publisher, WorkerMetrics(registry))
    for batch, seconds in ((1, 0.01), (3, 0.02), (4, 0.04)):
        reporter.decode(batch, seconds)
    value = registry.get_sample_value
    assert value("kvstore_worker_decode_seconds_sum", {"batch": "1"}) == 0.01
    assert value("kvstore_worker_decode_seconds_count", {"batch": "4"}) == 2


def test_with_the_load_go_the_rates_of_loading() -> None:
    pool = PagePool(1, block_bytes=4096, policy=Lru())
    publisher = Publisher("w", 1, [TierKind.HBM], pool)
    reporter = Reporter(publisher, WorkerMetrics(CollectorRegistry()))
    reporter.publish(pool, Loaded(running=1))
    assert publisher.load == Loaded(running=1)
    use = CacheUse(1_000, 32, {TierKind.DRAM: 800}, MissReason.ABSENT)
    reporter.first_token(FirstTokens(use, 50.0, 5.0, 4.0))
    reporter.publish(pool, Loaded(running=2))
    assert publisher.load == Loaded(running=2, load_rates=(LoadRate(TierKind.DRAM, 5e-6),))


def test_with_the_load_goes_the_role() -> None:
    pool = PagePool(1, block_bytes=4096, policy=Lru())
    publisher = Publisher("w", 1, [TierKind.HBM], pool)
    metrics = WorkerMetrics(CollectorRegistry())
    Reporter(publisher, metrics, WorkerRole.PREFILL).publish(pool, Loaded(running=1))
    assert publisher.load == Loaded(running=1, role=WorkerRole.PREFILL)
