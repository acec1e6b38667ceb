from collections.abc import Sequence

import pytest

from tests.exactness import Exactness


class FixedGap:
    def __init__(self, gap: float) -> None:
        self.value = gap
        self.asked: list[list[int]] = []

    def gap(self, tokens: Sequence[int]) -> float:
        self.asked.append(list(tokens))
        return self.value


def test_equal_replies_ask_nothing() -> None:
    reference = FixedGap(0.0)
    judge = Exactness(reference)  # type: ignore[arg-type]
    judge.check("same", [1], [2, 3], [2, 3])
    assert (judge.equal, judge.replies, reference.asked) == (1, 1, [])


@pytest.mark.parametrize("actual", [[2, 9, 4], [2], [2, 9]])
def test_a_near_tie_is_counted_at_the_first_difference(actual: list[int]) -> None:
    reference = FixedGap(5e-4)
    judge = Exactness(reference)  # type: ignore[arg-type]
    judge.check("tie", [1], [2, 3, 4], actual)
    assert reference.asked == [[1, 2]]
    assert len(judge.near_ties) == 1 and judge.equal == 0


def test_a_real_difference_fails() -> None:
    judge = Exactness(FixedGap(0.5))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="differs at token 1"):
        judge.check("wrong", [1], [2, 3], [2, 4])
