"""The ledger: who used what, and the last requests with their explanation."""

import pytest
from kvworkers.frontends.generation import CacheAccount
from kvworkers.frontends.ledger import Ledger, Usage
from prometheus_client import CollectorRegistry

from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.observe.metrics import RouterMetrics

ACCOUNT = CacheAccount(
    prompt_tokens=100,
    by_tier={TierKind.HBM: 32, TierKind.DRAM: 16},
    computed_tokens=52,
    miss_reason=MissReason.ABSENT,
    places="node-a",
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_usage_is_counted_by_domain(registry: CollectorRegistry) -> None:
    ledger = Ledger(RouterMetrics(registry))
    for domain in ("acme", "acme", "zoo"):
        entry = ledger.begin("r", domain=domain, model="m", prompt_tokens=100)
        ledger.found(entry, ACCOUNT, "w")
        ledger.first_token(entry, 250.0)
        ledger.end(entry, "stop", output_tokens=5, lasted_s=1.25)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("kvstore_domain_requests_total", domain="acme") == 2
    for kind, tokens in (("prompt", 200), ("cached", 96), ("output", 10)):
        assert value("kvstore_domain_tokens_total", domain="acme", kind=kind) == tokens
    assert value("kvstore_domain_tokens_total", domain="zoo", kind="prompt") == 100
    assert value("kvstore_cached_tokens_total", tier="hbm") == 96
    assert value("kvstore_requests_total", outcome="stop") == 3
    assert value("kvstore_ttft_seconds_count", cached="yes") == 3
    assert value("kvstore_tpot_seconds_sum") == pytest.approx(3 * 0.25)


def test_the_last_requests_are_kept_newest_first(registry: CollectorRegistry) -> None:
    clock = iter(range(100))
    ledger = Ledger(RouterMetrics(registry), kept=3, now_s=lambda: float(next(clock)))
    for number in range(5):
        entry = ledger.begin(str(number), domain="d", model="m", prompt_tokens=1)
        assert entry.began_s == number
        ledger.end(entry, "length", output_tokens=number, lasted_s=1.0)
    assert [(one.request_id, one.output_tokens) for one in ledger.latest()] == [
        ("4", 4), ("3", 3), ("2", 2),
    ]  # fmt: skip


def test_many_domains_cost_few_series(registry: CollectorRegistry) -> None:
    ledger = Ledger(RouterMetrics(registry))
    for number in range(1_000):
        ledger.begin("r", domain=f"tenant-{number}", model="m", prompt_tokens=1)
    text = [s for m in registry.collect() for s in m.samples if s.name.startswith("kvstore_domain")]
    assert len({s.labels["domain"] for s in text}) == 65
    assert registry.get_sample_value("kvstore_domain_requests_total", {"domain": "other"}) == 936


def test_totals_and_usage_are_what_the_console_shows(registry: CollectorRegistry) -> None:
    ledger = Ledger(RouterMetrics(registry))
    entry = ledger.begin("r", domain="acme", model="m", prompt_tokens=100)
    assert ledger.running == 1 == registry.get_sample_value("kvstore_requests_in_flight")
    ledger.found(entry, ACCOUNT, "w")
    ledger.first_token(entry, 250.0)
    ledger.end(entry, "stop", output_tokens=5, lasted_s=1.0)
    assert ledger.running == 0 and ledger.usage["acme"] == Usage(1, 100, 48, 5)
    totals = ledger.totals
    assert (totals.ended, totals.prompt_tokens, totals.by_tier[TierKind.HBM]) == (1, 100, 32)
    assert (totals.ttft_ms, totals.first_tokens) == (250.0, 1)
