"""A split is chosen exactly where some pair of workers is predicted to cost less than any one."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvstore.directory.events import WorkerRole
from kvstore.router.ranking import arrivals, rank
from kvstore.router.score import Candidate, Pace, Score, Source, Work, score
from kvstore.router.split import CALLS_S, Side, Split, Whole, choose

TOKENS = 640


@st.composite
def sides(draw: st.DrawFn) -> list[Side]:
    found = []
    for number in range(draw(st.integers(1, 6))):
        own, below = draw(st.integers(0, 39)) * 16, draw(st.integers(0, 39)) * 16
        rate = draw(st.sampled_from([0.0, 1e-6, 2e-5, 1e-3, 1e-2]))
        candidate = Candidate(
            f"w{number}",
            own,
            [Source("dram", below, rate)] if below > own else [],
            Pace(draw(st.sampled_from([1e-5, 1e-4, 1e-3])), measured=True),
            Work.of(draw(st.integers(0, 4_000)), 0),
            draw(st.integers(0, 64)),
            draw(st.floats(0, 1)),
            below,
            draw(st.integers(0, 4)),
        )
        arena = Source("dram", 0, rate) if draw(st.booleans()) else None
        role = draw(st.sampled_from(WorkerRole))
        found.append(Side(candidate, role, draw(st.sampled_from(["", "g", "h"])), arena))
    return found


def pair_costs(found: list[Side]) -> dict[tuple[str, str], float]:
    """Return what every pair costs, by the words of the formula."""
    takers = [one for one in found if one.role is not WorkerRole.PREFILL]
    rate = arrivals([one.candidate for one in takers])
    costs = {}
    for host in {one.host for one in found if one.host}:
        firsts = [
            one.candidate for one in found if one.role is WorkerRole.PREFILL and one.host == host
        ]
        for first in rank(firsts, TOKENS):
            for taker in takers:
                if taker.host == host and taker.arena is not None:
                    after = replace(
                        taker.candidate,
                        sources=[taker.arena._replace(until_tokens=TOKENS)],
                        below_tokens=TOKENS,
                    )
                    later = score(after, TOKENS + 1, rate=rate)
                    costs[first.name, later.name] = first.cost_s + CALLS_S + later.cost_s
    return costs


@given(sides())
def test_no_split_is_chosen_that_costs_more_than_one_worker(found: list[Side]) -> None:
    answering = [one.candidate for one in found if one.role is not WorkerRole.PREFILL]
    if not answering:
        return
    alone: Score = rank(answering, TOKENS)[0]
    costs, choice = pair_costs(found), choose(found, TOKENS, alone)
    least = min(costs.values(), default=float("inf"))
    if isinstance(choice, Split):
        assert choice.total_s < alone.cost_s
        assert choice.total_s == least == costs[choice.scores[0].name, choice.takers[0]]
        assert found[choice.prefill].candidate.name == choice.scores[0].name
        assert choice.hand_over_s >= CALLS_S
    else:
        assert least >= alone.cost_s
        assert (choice is Whole.DEARER) == bool(costs)
