from kvworkers.frontends.generation import CacheAccount
from kvworkers.frontends.history import History
from kvworkers.frontends.ledger import Ledger
from prometheus_client import CollectorRegistry

from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.observe.metrics import RouterMetrics


def served(ledger: Ledger, hbm: int, ttft_ms: float) -> None:
    entry = ledger.begin("r", domain="d", model="m", prompt_tokens=100)
    by_tier = dict.fromkeys(TierKind, 0) | {TierKind.HBM: hbm}
    ledger.found(entry, CacheAccount(100, by_tier, 100 - hbm, MissReason.ABSENT, ""), "w")
    ledger.first_token(entry, ttft_ms)
    ledger.end(entry, "stop", output_tokens=1, lasted_s=1.0)


def test_a_step_is_what_happened_since_the_last_one() -> None:
    ledger = Ledger(RouterMetrics(CollectorRegistry()))
    served(ledger, 16, 10.0)  # before the history began
    history = History(ledger)
    served(ledger, 32, 20.0)
    served(ledger, 64, 40.0)
    history.note(5.0, running=1, waiting=2)
    history.note(10.0, running=0, waiting=0)
    first, second = history.steps()
    assert (first.ended, first.prompt_tokens, first.by_tier[0]) == (2, 200, 96)
    assert (first.ttft_ms, first.running, first.waiting) == (30.0, 1, 2)
    assert (second.at_s, second.ended, second.ttft_ms) == (10.0, 0, None)


def test_it_is_a_ring() -> None:
    history = History(Ledger(RouterMetrics(CollectorRegistry())), steps=3)
    for at in range(10):
        history.note(float(at), running=0, waiting=0)
    assert [step.at_s for step in history.steps()] == [7.0, 8.0, 9.0]
