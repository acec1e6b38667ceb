import pytest
from kvworkers.engine.preemption import Candidate, Prices, choose, settled_blocks
from kvworkers.engine.rates import Rates
from kvworkers.engine.sampling import SamplingParams
from kvworkers.engine.sequence import Request, Sequence

from kvstore.core.names import Root, pack_tokens


def run(tokens: int, *, computed: int, stored: int = 0, no_read: bool = False) -> Sequence:
    request = Request(
        request_id="r",
        tokens=pack_tokens(list(range(tokens))),
        sampling=SamplingParams(max_tokens=4),
        no_read=no_read,
    )
    made = Sequence(request, Root(b"r" * 32), arrived_ms=0.0)
    made.computed, made.stored = computed, stored
    return made


def test_the_cheapest_for_a_page_that_helps_makes_way() -> None:
    small, large = Candidate(1, 2, 2.0), Candidate(2, 100, 50.0)
    assert choose([small, large], short=1, wanted=2) == [1], "a hundred pages help no more than two"
    assert choose([small, large], short=1, wanted=60) == [2]
    assert choose([small, large], short=3, wanted=3) == [1, 2]


def test_of_equals_who_came_last_goes_first() -> None:
    equals = [Candidate(turn, 4, 8.0) for turn in (3, 9, 5)]
    assert choose(equals, short=1, wanted=4) == [9]
    assert choose(equals, short=5, wanted=8) == [9, 5]


def test_who_frees_nothing_is_left_alone_and_too_few_are_said() -> None:
    assert choose([Candidate(1, 0, 0.0)], short=1, wanted=1) == []
    assert choose([Candidate(1, 0, 0.0), Candidate(2, 1, 9.0)], short=5, wanted=9) == [2]


@pytest.mark.parametrize(
    ("stored", "no_read", "exact", "settled"),
    [(4, False, True, 3), (2, False, True, 2), (4, True, True, 0), (4, False, False, 0)],
)
def test_blocks_that_the_store_gives_back_as_they_were_are_not_copied(
    stored: int, no_read: bool, exact: bool, settled: int
) -> None:
    one = run(70, computed=50, stored=stored, no_read=no_read)
    assert settled_blocks(one, exact=exact) == settled


def test_a_victim_costs_what_its_return_takes() -> None:
    one = run(70, computed=50, stored=2)
    swap = Prices(block_ms=1.5)
    assert swap.of(one) == 1.5 * (2 * 2 + 2), "two blocks out and back, two only back"
    assert Prices(block_ms=1.5, exact=False).of(one) == 1.5 * 2 * 4
    assert Prices(Rates(prefill_linear_s=0.001)).of(one) == pytest.approx(50)
    assert Prices().of(one) == 50, "not measured yet"
    one.preemptions = 2
    assert swap.of(one) == 3 * 1.5 * 6, "nobody is always the one"
