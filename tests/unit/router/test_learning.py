import pytest

from kvstore.directory.events import TierKind
from kvstore.router.learning import (
    MAX_CORRECTION,
    NEWEST,
    TRUST_HALF_LIFE_MS,
    Actual,
    Expected,
    Learned,
    Promise,
)
from kvstore.router.score import Pace

PACE = Pace(1e-3, 0.0, 1.0, True)


def expected(*promises: Promise, hit: int = 320, pace: Pace = PACE) -> Expected:
    return Expected(1_000, hit, 0.680, 0.0, 0.0, pace, promises)


def test_rates_follow_what_requests_took() -> None:
    learned = Learned()
    assert learned.correction("w", measured=True) == 0.0
    pace = PACE
    for _ in range(60):
        factor = learned.correction("w", measured=True) or 1.0
        pace = Pace(1e-3 * factor, 0.0, factor, True)
        actual = Actual(hit_tokens=320, ttft_ms=2_080, queue_ms=30, load_ms=10)
        learned.observe("w", expected(pace=pace), actual, 0.0)
    assert learned.correction("w", measured=True) == pytest.approx(3.0)
    assert learned.correction("w", measured=False) == 0.0
    assert pace.between(320, 1_000) == pytest.approx(2.04)
    learned.forget("w")
    assert learned.correction("w", measured=True) == 0.0


def test_a_shorter_hit_than_predicted_is_no_slowness() -> None:
    learned = Learned()
    learned.observe("w", expected(), Actual(hit_tokens=0, ttft_ms=1_000), 0.0)
    assert learned.correction("w", measured=True) == pytest.approx(1.0)


def test_outliers_are_bounded_and_empty_answers_teach_nothing() -> None:
    learned = Learned()
    learned.observe("w", expected(), Actual(hit_tokens=320, ttft_ms=1e9), 0.0)
    assert learned.correction("w", measured=True) == pytest.approx(MAX_CORRECTION)
    for actual in (Actual(hit_tokens=320), Actual(hit_tokens=320, ttft_ms=5, queue_ms=9)):
        learned.observe("v", expected(), actual, 0.0)
    short = Expected(1_000, 320, 0.0, 0.0, 0.0, Pace(1e-9), ())
    learned.observe("v", short, Actual(hit_tokens=320, ttft_ms=5), 0.0)
    assert learned.correction("v", measured=True) == 0.0


def test_a_tier_s_rate_is_learnt_from_answers_that_loaded_from_it_alone() -> None:
    learned = Learned()

    def answer(load_ms: float, **tokens: int) -> None:
        tiers = {TierKind[tier.upper()]: count for tier, count in tokens.items()}
        actual = Actual(hit_tokens=320, load_ms=load_ms, by_tier=tiers)
        learned.observe("w", expected(), actual, 0.0)

    answer(50, hbm=100, dram=100, nvme=100)
    answer(0, dram=100)
    assert learned.load_s_per_token("w", TierKind.DRAM) == 0.0
    answer(50, hbm=100, dram=100)
    assert learned.load_s_per_token("w", TierKind.DRAM) == pytest.approx(5e-4)
    answer(100, dram=100)
    assert learned.load_s_per_token("w", TierKind.DRAM) == pytest.approx(5e-4 * (1 + NEWEST))
    assert learned.load_s_per_token("w", TierKind.NVME) == 0.0
    learned.forget("w")
    assert learned.load_s_per_token("w", TierKind.DRAM) == 0.0


def test_trust_falls_where_the_promise_broke_and_comes_back() -> None:
    learned = Learned()
    made = expected(Promise("w", 160), Promise("node", 320))
    learned.observe("w", made, Actual(hit_tokens=160), 0.0)
    assert learned.trust("w", 0.0) == 1.0
    assert learned.trust("node", 0.0) == pytest.approx(1 - NEWEST)
    assert learned.doubted() == ["node"]
    assert learned.lowest_trust(0.0) == pytest.approx(1 - NEWEST)
    assert learned.trust("node", TRUST_HALF_LIFE_MS) == pytest.approx(1 - NEWEST / 2)
    learned.observe("w", made, Actual(hit_tokens=400), 0.0)
    assert learned.trust("node", 0.0) == pytest.approx(1 - NEWEST * (1 - NEWEST))
    assert learned.trust("node", 100 * TRUST_HALF_LIFE_MS) == 1.0
    assert (learned.doubted(), learned.lowest_trust(0.0)) == ([], 1.0)


def test_nobody_is_blamed_for_what_was_only_coming() -> None:
    learned = Learned()
    learned.observe("w", expected(Promise("", 320)), Actual(hit_tokens=0), 0.0)
    learned.observe("w", expected(Promise("w", 0)), Actual(hit_tokens=0), 0.0)
    assert learned.doubted() == []


def test_whether_loads_hide_behind_the_queue_is_learnt_from_answers_with_both() -> None:
    learned = Learned()

    def answer(before_s: float, queue_s: float = 2.0, load_s: float = 1.0) -> bool:
        """The worker counts as queue what is left of the time before its turn without the load."""
        told = Expected(1_000, 320, 0.680, queue_s, 0.0, PACE, ())
        queue_ms = (before_s - load_s) * 1_000
        actual = Actual(hit_tokens=320, queue_ms=queue_ms, load_ms=load_s * 1_000)
        learned.observe("w", told, actual, 0.0)
        return learned.overlaps("w")

    assert learned.overlaps("w"), "as our own workers do"
    assert answer(before_s=2.0)
    assert answer(before_s=3.0) and answer(before_s=3.0), "two answers are no rule"
    assert not answer(before_s=3.0)
    assert not answer(before_s=1.0, queue_s=0.0), "without a queue there is nothing to tell"
    assert not answer(before_s=2.0, load_s=0.01), "of a short load behind a long queue next to it"
    assert answer(before_s=2.0) and answer(before_s=2.0)
    for _ in range(9):
        answer(before_s=2.0)
    assert answer(before_s=90.0), "an outlier is one answer"
    for _ in range(9):
        answer(before_s=3.0)
    assert not learned.overlaps("w")
    learned.forget("w")
    assert learned.overlaps("w")


def test_an_answer_that_tells_no_times_says_nothing_about_overlap() -> None:
    learned = Learned()
    told = Expected(1_000, 320, 0.680, 2.0, 0.0, PACE, ())
    for actual in (Actual(hit_tokens=320, load_ms=900.0), Actual(hit_tokens=320, queue_ms=2_500.0)):
        learned.observe("w", told, actual, 0.0)
    assert learned.overlaps("w")
