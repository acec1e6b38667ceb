from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.router.score import LOAD_COST, Candidate, prefill_seconds, rank, score


def candidate(name: str = "a", own: int = 0, hit: int = 0, **rest: float) -> Candidate:
    return Candidate(name=name, own_tokens=own, hit_tokens=max(own, hit), **rest)  # type: ignore[arg-type]


def best(*candidates: Candidate, prompt: int = 1_000) -> str:
    return rank(candidates, prompt)[0].name


def test_the_longest_prefix_wins_when_nobody_queues() -> None:
    assert best(candidate("a", own=160), candidate("b", own=480), candidate("c")) == "b"


def test_a_long_queue_outweighs_a_hit() -> None:
    busy = candidate("a", own=480, queued_tokens=5_000)
    assert best(busy, candidate("b")) == "b"
    assert best(replace(busy, queued_tokens=400), candidate("b")) == "a"


def test_own_pages_are_better_than_the_host_s() -> None:
    assert best(candidate("a", hit=480), candidate("b", own=480)) == "b"
    # A load is cheap, so a short queue already tips the scale the other way.
    assert best(candidate("a", hit=480), candidate("b", own=480, queued_tokens=20)) == "a"


def test_ties_go_to_the_emptier_pool_then_the_idler_then_the_name() -> None:
    assert best(candidate("a", kv_used=0.5), candidate("b", kv_used=0.1)) == "b"
    assert best(candidate("a", running=2), candidate("b", running=1)) == "b"
    assert best(candidate("b"), candidate("a")) == "a"


def test_a_slow_worker_loses_to_a_fast_one_with_fewer_hits() -> None:
    slow = candidate("a", own=480, prefill_tokens_per_s=100.0)
    fast = candidate("b", prefill_tokens_per_s=10_000.0)
    assert best(slow, fast) == "b"


def test_an_unmeasured_worker_counts_as_the_median_of_the_measured() -> None:
    scores = rank([candidate("a"), candidate("b", own=16, prefill_tokens_per_s=500.0)], 1_000)
    assert {entry.name: entry.prefill_s for entry in scores} == {"a": 2.0, "b": 984 / 500}


def test_measured_coefficients_price_the_depth() -> None:
    one = candidate(prefill_linear_s=1e-3, prefill_quadratic_s=1e-6)
    assert prefill_seconds(one, 100, 1_000, 1.0) == pytest.approx(100 * (1e-3 + 1e-6 * 1_050))
    assert prefill_seconds(candidate(prefill_tokens_per_s=50.0), 100, 0, 1.0) == 2.0
    assert prefill_seconds(candidate(), 100, 0, 25.0) == 4.0


def test_a_score_shows_what_it_is_made_of() -> None:
    entry = score(candidate("a", own=100, hit=300, queued_tokens=50), 1_000, 1_000.0)
    assert (entry.queue_s, entry.load_s, entry.prefill_s) == (0.05, LOAD_COST * 0.2, 0.7)
    assert entry.ttft_s == pytest.approx(0.754)
    assert entry.explain() == (
        "a: 754.0 ms = queue 50.0 + load 4.0 + prefill 700.0 (300 tokens cached, 50 queued)"
    )


@given(
    own=st.integers(0, 500), more=st.integers(0, 500), queued=st.integers(0, 10_000),
    better=st.integers(0, 500),
)  # fmt: skip
def test_more_hits_and_less_queue_never_hurt(own: int, more: int, queued: int, better: int) -> None:
    base = candidate(own=own, hit=own + more, queued_tokens=queued)
    prompt = 2_000
    before = score(base, prompt, 1_000.0).ttft_s
    hits = replace(base, own_tokens=own + better, hit_tokens=own + more + better)
    assert score(hits, prompt, 1_000.0).ttft_s <= before
    assert score(replace(base, queued_tokens=0), prompt, 1_000.0).ttft_s <= before
