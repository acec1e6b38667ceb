from dataclasses import replace
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.router.ranking import MOST_SHARE, MOST_WAITING, arrivals, rank
from kvstore.router.score import (
    COPY,
    DECODE,
    LOAD_COST,
    MOVE,
    Candidate,
    Pace,
    Rates,
    Source,
    Work,
    paces,
    plan_sources,
    score,
)

PACE = Pace(1e-3)


def candidate(name: str = "a", own: int = 0, hit: int = 0, **rest: object) -> Candidate:
    sources = (Source("dram", hit, 0.0),) if hit > own else ()
    return Candidate(name, own, sources, **rest)  # type: ignore[arg-type]


def queue(tokens: int) -> Work:
    return Work.of(tokens, 0)


def best(*candidates: Candidate, prompt: int = 1_000) -> str:
    return rank(candidates, prompt)[0].name


def test_the_longest_prefix_wins_when_nobody_queues() -> None:
    assert best(candidate("a", own=160), candidate("b", own=480), candidate("c")) == "b"


def test_a_long_queue_outweighs_a_hit() -> None:
    busy = candidate("a", own=480, queued=queue(5_000))
    assert best(busy, candidate("b")) == "b"
    assert best(replace(busy, queued=queue(400)), candidate("b")) == "a"


def test_own_pages_are_better_than_the_host_s() -> None:
    assert best(candidate("a", hit=480), candidate("b", own=480)) == "b"
    # A load is cheap, so a queue that outlasts it already tips the scale the other way.
    assert best(candidate("a", hit=480), candidate("b", own=480, queued=queue(60))) == "a"


def test_ties_go_to_the_emptier_pool_then_the_idler_then_the_name() -> None:
    assert best(candidate("a", kv_used=0.5), candidate("b", kv_used=0.1)) == "b"
    assert best(candidate("a", own=992, running=2), candidate("b", own=992, running=1)) == "b"
    assert best(candidate("b"), candidate("a")) == "a"


def test_a_slow_worker_loses_to_a_fast_one_with_fewer_hits() -> None:
    slow, fast = paces([Rates(100.0), Rates(10_000.0)])
    assert best(candidate("a", own=480, pace=slow), candidate("b", pace=fast)) == "b"


def test_an_unmeasured_worker_counts_as_the_median_of_the_measured() -> None:
    assert paces([Rates(), Rates(500.0)]) == [
        Pace(1 / 500, measured=False), Pace(1 / 500, measured=True)
    ]  # fmt: skip
    assert paces([Rates()]) == [Pace(1e-3)]


def test_a_correction_scales_and_the_median_stands_in_for_an_unknown_one() -> None:
    found = paces([Rates(correction=3.0), Rates(correction=1.0), Rates()])
    assert [pace.linear_s for pace in found] == pytest.approx([3e-3, 1e-3, 2e-3])
    assert paces([Rates(9.0, 1e-3, 1e-6, 2.0)]) == [Pace(2e-3, 2e-6, 2.0, True)]
    assert paces([Rates(9.0, 1e-3, -1e-6)])[0].quadratic_s == 0.0


def test_depth_is_priced() -> None:
    assert Pace(1e-3, 1e-6).between(1_000, 1_100) == pytest.approx(100 * (1e-3 + 1e-6 * 1_050))


def test_a_queue_of_many_prompts_is_cheaper_than_one_long_prompt() -> None:
    pace = Pace(1e-3, 1e-6)
    many = pace.seconds(Work.of(10_000, 0, prompts=10))
    assert many == pytest.approx(10 * pace.between(0, 1_000))
    assert pace.seconds(Work.of(10_000, 0)) == pytest.approx(pace.between(0, 10_000))


def test_a_load_hides_behind_the_queue() -> None:
    """100 tokens a second from the tier, 1,000 computed: only what outlasts the queue counts."""
    fast = Candidate("a", 0, (Source("dram", 640, 1e-4),))
    assert plan_sources(fast, 1_000, 1.0).ttft_s == pytest.approx(1.36)
    assert plan_sources(fast, 1_000, 1.0).split_tokens == 0


def test_a_split_computes_the_beginning_while_the_end_loads() -> None:
    """A tier as fast as computing halves the wait for a prefix."""
    plan = plan_sources(Candidate("a", 0, (Source("nvme", 640, 1e-3),)), 1_000, 0.0)
    assert (plan.split_tokens, plan.hit_tokens) == (320, 640)
    assert plan.ttft_s == pytest.approx(0.320 + 0.360)
    assert plan.load_s == pytest.approx(0.320)


def test_a_tier_that_loads_slower_than_it_computes_is_left_out() -> None:
    tiers = (Source("dram", 320, 1e-5), Source("files", 640, 1.0))
    plan = plan_sources(Candidate("a", 160, tiers), 1_000, 0.0)
    assert plan.hit_tokens == 320
    only = plan_sources(Candidate("a", 160, tiers[1:]), 1_000, 0.0)
    assert only.hit_tokens == 160
    assert only.ttft_s == pytest.approx(0.840)


def test_a_tier_that_adds_nothing_is_passed_over() -> None:
    tiers = (Source("dram", 160, 1e-9), Source("nvme", 320, 1e-5))
    assert plan_sources(Candidate("a", 160, tiers), 1_000, 0.0).hit_tokens == 320


def test_what_others_load_from_a_device_delays_ours() -> None:
    idle = Source("nvme", 640, 1e-4)
    behind = idle._replace(ahead_tokens=6_400)
    sooner = plan_sources(Candidate("a", 0, (idle,)), 1_000, 0.0)
    later = plan_sources(Candidate("a", 0, (behind,)), 1_000, 0.0)
    assert sooner.ttft_s < later.ttft_s <= 1.0


def test_what_a_request_costs_others_ranks_and_delays_nothing() -> None:
    busy, idle = candidate("a", running=20), candidate("b", running=0, kv_used=0.9)
    assert best(busy, idle) == "b"
    full = replace(busy, kv_used=0.5)
    entry = score(full, 1_000, most_own_tokens=480)
    assert entry.others_s == pytest.approx(DECODE * 20 * 1.0 + MOVE * 0.5 * 0.480)
    assert (entry.ttft_s, entry.cost_s) == (1.0, 1.0 + entry.others_s)


def test_a_move_costs_less_where_a_tier_below_has_what_it_evicts() -> None:
    full = candidate("a", kv_used=0.5)
    kept = replace(full, below_tokens=360)
    costs = [score(one, 1_000, most_own_tokens=480).others_s for one in (full, kept)]
    assert costs[1] == pytest.approx(0.25 * costs[0]) and costs[0] > 0


def test_a_ranking_makes_scores_when_asked() -> None:
    ranking = rank([candidate("a", hit=320), candidate("b", own=480)], 1_000)
    assert len(ranking) == 2 and ranking[0].name == ranking[:1][0].name == "b"
    assert ranking.best_index == 1
    assert (ranking.longest().name, ranking[1:].longest().name) == ("b", "a")
    assert ranking[1] == score(candidate("a", hit=320), 1_000, most_own_tokens=480)


def test_work_that_makes_a_wanted_copy_is_no_cost() -> None:
    empty = score(candidate("b"), 1_000, most_own_tokens=480)
    assert empty.others_s == 0.0, "a copy in empty pages evicts nothing"
    newcomer = score(candidate("b", kv_used=1.0), 1_000, most_own_tokens=480, hot_tokens=320)
    assert newcomer.others_s == pytest.approx(MOVE * 0.160 - COPY * 0.320)
    holder = score(candidate("a", own=480), 1_000, most_own_tokens=480, hot_tokens=320)
    assert holder.others_s == 0.0
    ranked = rank([candidate("a", own=480), candidate("b")], 1_000, hot_tokens=480)
    assert [one.name for one in ranked] == ["b", "a"]


def test_a_load_that_hides_still_occupies() -> None:
    """What a tier gives to a busy worker is not free: it loads and computes one after the other."""
    busy = candidate("a", hit=480, queued=queue(500), kv_used=1.0)
    hidden = score(busy, 1_000, most_own_tokens=480)
    assert hidden.ttft_s == pytest.approx(1.020)
    assert hidden.others_s == pytest.approx(MOVE * LOAD_COST * 0.480)


def test_a_score_shows_what_it_is_made_of() -> None:
    entry = score(candidate("a", own=96, hit=304, queued=queue(2)), 1_000)
    assert entry.queue_s == 0.002
    assert entry.plan.split_tokens == 96
    assert entry.plan.load_s == pytest.approx(LOAD_COST * 0.208)
    assert entry.explain() == (
        "a: 700.2 ms = queue 2.0 + load 2.2 of 4.2 + prefill 696.0; others 0.0"
        " (304 tokens cached, 96 of them in its pages, 2 queued)"
    )
    assert entry.hit_tokens == 304


TIERS = st.lists(
    st.tuples(st.integers(1, 20), st.floats(1e-6, 1e-2), st.integers(0, 500)), max_size=3
)


@given(own=st.integers(0, 20), tiers=TIERS, queued=st.integers(0, 3_000), depth=st.floats(0, 1e-5))
def test_no_plan_beats_the_chosen_one(
    own: int, tiers: list[tuple[int, float, int]], queued: int, depth: float
) -> None:
    """Against every end of a tier with every split, priced anew."""
    pace, prompt, until = Pace(1e-3, depth), 1_600, own * 16
    sources = []
    for blocks, each, ahead in tiers:
        until += blocks * 16
        sources.append(Source("tier", until, each, ahead))
    mine = Candidate("a", own * 16, sources, pace, queue(queued))
    queue_s = pace.seconds(mine.queued)
    plans = [queue_s + pace.between(own * 16, prompt)]
    for end in sources:
        for split in range(own * 16, end.until_tokens + 1, 16):
            load_s, first = 0.0, split
            for source in sources:
                last = min(source.until_tokens, end.until_tokens)
                if last > first:
                    load_s += (last - first + source.ahead_tokens) * source.s_per_token
                    first = last
            before_s = queue_s + pace.between(own * 16, split)
            plans.append(max(before_s, load_s) + pace.between(end.until_tokens, prompt))
    found = score(mine, prompt).ttft_s
    assert found == pytest.approx(min(plans))


@given(
    own=st.integers(0, 31), more=st.integers(0, 31), queued=st.integers(0, 10_000),
    better=st.integers(0, 31),
)  # fmt: skip
def test_more_hits_and_less_queue_never_hurt(own: int, more: int, queued: int, better: int) -> None:
    base = candidate(own=own * 16, hit=(own + more) * 16, queued=queue(queued))
    hits = candidate(own=(own + better) * 16, hit=(own + more + better) * 16, queued=queue(queued))
    before = score(base, 2_000).ttft_s
    assert score(hits, 2_000).ttft_s <= before + 1e-9
    assert score(replace(base, queued=Work()), 2_000).ttft_s <= before


def test_as_many_come_in_a_second_of_queue_as_wait_now() -> None:
    idle, busy = candidate("a"), candidate("b", queued=queue(4_000), waiting=6)
    assert arrivals([idle, busy]) == pytest.approx(6 / 4.0)
    assert arrivals([idle]) == 0.0
    # A queue that ended since it was counted, and one that nobody has counted yet.
    assert arrivals([candidate("a", waiting=3)]) == 0.0
    assert arrivals([candidate("a", queued=queue(500))]) == 0.0


LIARS = {
    "many": candidate("z", queued=queue(4_000), waiting=4_000_000_000),
    "many behind nothing": candidate("z", queued=queue(1), waiting=50),
    "none behind much": candidate("z", queued=queue(4_000_000_000)),
    "no queue": candidate("z", waiting=4_000_000_000),
    "no number": candidate("z", queued=queue(4_000), waiting=6, pace=Pace(nan)),
    "no end": candidate("z", queued=queue(4_000), waiting=6, pace=Pace(inf)),
    "free": candidate("z", queued=queue(4_000), waiting=6, pace=Pace(0.0)),
}


@pytest.mark.parametrize("liar", LIARS.values(), ids=LIARS)
def test_one_worker_s_nonsense_prices_no_places_of_others(liar: Candidate) -> None:
    honest = [candidate(str(at), queued=queue(19_000 + 250 * at), waiting=20) for at in range(9)]
    alone = arrivals(honest)
    assert alone == pytest.approx(20 / 20.0)
    assert alone / 3 < arrivals([*honest, liar]) < 3 * alone
    most = MOST_WAITING + (MOST_SHARE + 1) * 20
    assert arrivals([honest[0], liar]) <= most / 19.0, "of two the lower one"


def test_who_says_no_numbers_is_as_fast_as_the_others() -> None:
    """A price that is no number has no place in an order, and takes the others' from them."""
    for wrong in (nan, inf):
        rates = [Rates(wrong), Rates(wrong, wrong), Rates(500.0)]
        assert paces(rates) == [Pace(2e-3), Pace(2e-3), Pace(2e-3, measured=True)]
        assert paces([Rates(9.0, 1e-3, wrong)]) == [Pace(1e-3, measured=True)]


def test_those_who_come_later_wait_for_what_a_request_makes_a_worker_do() -> None:
    one = candidate("a", own=496, queued=queue(2_000))
    alone, followed = score(one, 1_000, 496), score(one, 1_000, 496, rate=3.0)
    work_s = followed.ttft_s - followed.queue_s
    assert work_s == pytest.approx(0.504)
    assert followed.ttft_s == alone.ttft_s
    assert followed.others_s - alone.others_s == pytest.approx(3.0 * work_s * (2.0 + work_s / 2))


def test_where_all_queues_are_long_saved_work_outweighs_a_shorter_one() -> None:
    def chosen(queued: int, waiting: int) -> str:
        holder = candidate("a", own=496, queued=queue(queued + 600), waiting=waiting)
        return best(holder, candidate("b", queued=queue(queued), waiting=waiting))

    assert chosen(0, 0) == "b"
    assert chosen(20_000, 0) == "b"
    assert chosen(20_000, 20) == "a"


def test_a_worker_that_loads_in_its_turn_computes_nothing_meanwhile() -> None:
    source = Source("dram", 960, 5e-4)
    together = Candidate("a", 0, [source], PACE, queue(300))
    turn = replace(together, overlaps=False)
    plan = plan_sources(turn, 1_000, 0.3)
    assert (plan.hit_tokens, plan.split_tokens) == (960, 0)
    assert plan.load_s == pytest.approx(0.48)
    assert plan.ttft_s == pytest.approx(0.3 + 0.48 + 0.04)
    assert plan_sources(together, 1_000, 0.3).ttft_s < plan.ttft_s
    # Behind a queue that hides the load, only the one that loads meanwhile has it for nothing.
    assert plan_sources(together, 1_000, 2.0).ttft_s == pytest.approx(2.04)
    assert plan_sources(turn, 1_000, 2.0).ttft_s == pytest.approx(2.52)
