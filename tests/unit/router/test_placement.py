import pytest

from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import BlockName, Root
from kvstore.directory.events import Began, Changed, Ended, Loaded, LoadRate, TierKind
from kvstore.directory.view import ClusterView
from kvstore.router.booking import Bookings
from kvstore.router.learning import Actual
from kvstore.router.members import Member, Members
from kvstore.router.placement import RATE_LEEWAY, Placement, Prompt
from kvstore.router.score import LOAD_COST

ROOT = Root(bytes(32))
NAMES = [BlockName(bytes([number]) * 32) for number in range(1, 21)]
PROMPT = Prompt(ROOT, NAMES, 20 * BLOCK_TOKENS + 1)


def made(own: list[BlockName], below: list[BlockName]) -> tuple[Placement, Bookings]:
    view, bookings = ClusterView(), Bookings(lifetime_ms=1e9)
    placement = Placement(view, bookings)
    placement.members = Members.of(
        [Member("worker", "w", "a:1", "h"), Member("node", "n", "a:2", "h")]
    )
    for name, tier, names in (("w", TierKind.HBM, own), ("n", TierKind.DRAM, below)):
        view.follow(name, host="h", now_ms=0.0)
        for event in (Began(name, 1, 0, (tier,), "h"), Changed(ROOT, tier, names), Ended(0)):
            view.apply(name, event, 0.0)
    return placement, bookings


def answer(placement: Placement, bookings: Bookings, actual: Actual) -> tuple[int, int]:
    """Let the next decision have such an outcome; returns the own and all tokens it promised."""
    decision = placement.decide(PROMPT, 0.0)
    assert decision is not None
    score = decision.scores[0]
    booking = bookings.book(
        decision.worker, ROOT, NAMES, hit_tokens=decision.hit_tokens,
        uncached_tokens=PROMPT.tokens - decision.hit_tokens, now_ms=0.0,
    )  # fmt: skip
    bookings.complete(booking.number)
    placement.learn(booking, decision.expected, actual, 0.0)
    return score.own_tokens, score.hit_tokens


def test_a_hole_in_own_pages_that_the_host_fills_is_loaded_from_there() -> None:
    placement, bookings = made([*NAMES[:6], *NAMES[7:]], NAMES)
    actual = Actual(hit_tokens=320, by_tier={TierKind.HBM: 96, TierKind.DRAM: 224})
    assert answer(placement, bookings, actual) == (320, 320)
    assert answer(placement, bookings, actual) == (96, 320)
    assert placement.learned.lowest_trust(0.0) == 1.0


def test_a_publisher_whose_blocks_are_not_there_is_to_blame() -> None:
    placement, bookings = made(NAMES, [])
    actual = Actual(hit_tokens=96, by_tier={TierKind.HBM: 96})
    assert answer(placement, bookings, actual) == (320, 320)
    assert placement.learned.trust("w", 0.0) < 1.0
    assert 96 < answer(placement, bookings, actual)[1] < 320


def test_an_answer_of_a_worker_that_left_teaches_no_holes() -> None:
    placement, bookings = made([*NAMES[:6], *NAMES[7:]], [])
    decision = placement.decide(PROMPT, 0.0)
    assert decision is not None
    booking = bookings.book("gone", ROOT, NAMES, hit_tokens=320, uncached_tokens=1, now_ms=0.0)
    placement.learn(booking, decision.expected, Actual(hit_tokens=96), 0.0)
    assert answer(placement, bookings, Actual(hit_tokens=320))[1] > 96


def test_loads_are_priced_as_the_worker_says_else_as_answers_taught() -> None:
    placement, bookings = made([], NAMES)

    def load_s() -> float:
        decision = placement.decide(PROMPT, 0.0)
        assert decision is not None
        return decision.scores[0].plan.load_s

    assert load_s() == pytest.approx(320 * LOAD_COST * 1e-3, rel=0.06), "assumed, less the split"
    actual = Actual(hit_tokens=320, load_ms=3.2, by_tier={TierKind.DRAM: 320})
    answer(placement, bookings, actual)
    assert load_s() == pytest.approx(320 * 1e-5, rel=0.06)
    told = Loaded(load_rates=(LoadRate(TierKind.DRAM, 5e-5), LoadRate(TierKind.NVME, 1.0)))
    assert placement._view.apply("w", told, 0.0) is None
    assert load_s() == pytest.approx(320 * 5e-5, rel=0.06), "of all its loads, not of ours alone"


@pytest.mark.parametrize(("told", "believed"), [(1e-300, 1e-5 / RATE_LEEWAY), (1e300, 8e-5)])
def test_a_load_rate_that_answers_belie_is_believed_in_part(told: float, believed: float) -> None:
    """A tier said to be free would draw every request for ever, whatever the loads take."""
    placement, bookings = made([], NAMES)
    assert RATE_LEEWAY == 8
    said = Loaded(load_rates=(LoadRate(TierKind.DRAM, told),))
    assert placement._view.apply("w", said, 0.0) is None
    assert priced(placement) == told, "nothing was measured yet"
    answer(placement, bookings, Actual(hit_tokens=320, load_ms=3.2, by_tier={TierKind.DRAM: 320}))
    assert priced(placement) == pytest.approx(believed)


def test_a_load_slower_than_computing_is_mostly_computed() -> None:
    placement, _ = made([], NAMES)
    slow = Loaded(load_rates=(LoadRate(TierKind.DRAM, 2e-3),))
    assert placement._view.apply("w", slow, 0.0) is None
    decision = placement.decide(PROMPT, 0.0)
    assert decision is not None and decision.scores[0].plan.split_tokens > 160, "mostly computed"


def priced(placement: Placement) -> float:
    """Return the seconds that loading a token from the host is expected to take."""
    assert placement.decide(PROMPT, 0.0) is not None  # reads the reports
    (seat,) = placement._seats.all
    return placement._load_s_per_token(seat, TierKind.DRAM)
