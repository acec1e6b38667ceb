"""The order of workers for one prompt: prices that `kvstore.router.score` makes, compared. Pure."""

from collections.abc import Sequence
from math import inf
from statistics import median_high, median_low
from typing import Final, overload

from kvstore.router.score import Candidate, Plan, Score, price, scored

MOST_SHARE: Final = 8.0
MOST_WAITING: Final = 64
"""More than this many, and so many times the median, no worker's waiting requests count for."""


def arrivals(candidates: Sequence[Candidate], queues: Sequence[float] | None = None) -> float:
    """Return how many requests come to a worker in a second of its queue; 0 where none waits.

    By what waits now: where requests come steadily, as many will come while a queue lasts as came
    while it grew. The mean of all, because who comes next is sent wherever it is best. It is what
    workers say: none counts for more than `MOST_WAITING` and `MOST_SHARE` times the median (of two
    the lower), nor for a queue of more than twice so many medians, or one that lies would price all
    places. `queues` are the candidates' `queue_s`, for a caller that has them.
    """
    said = [one.waiting for one in candidates]
    if not sum(said):
        return 0.0
    if queues is None:
        queues = [one.queue_s for one in candidates]
    known = [queue_s for queue_s in queues if 0 < queue_s < inf]
    if not known:
        return 0.0
    most, most_s = MOST_WAITING + MOST_SHARE * median_low(said), 2 * MOST_SHARE * median_high(known)
    waiting = sum([each if each < most else most for each in said])
    return waiting / sum([queue_s if queue_s < most_s else most_s for queue_s in known])


_Row = tuple[float, float, int, str, int, Candidate, float, Plan, float]
"""What the order goes by, up to the name, which no two share; then the index among the candidates
and what a score is made of. Plain, because every worker of every decision is one."""


class Ranking(Sequence[Score]):
    """Scores, best first, each made when somebody asks for it: a choice looks at one of them."""

    __slots__ = ("_rows",)

    def __init__(self, rows: list[_Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> Score: ...
    @overload
    def __getitem__(self, at: slice) -> "Ranking": ...
    def __getitem__(self, at: int | slice) -> "Score | Ranking":
        if isinstance(at, slice):
            return Ranking(self._rows[at])
        return scored(*self._rows[at][5:])

    @property
    def best_index(self) -> int:
        """Where the best one stood among the candidates."""
        return self._rows[0][4]

    def longest(self) -> Score:
        """Return the one that reaches the longest prefix; of several the best."""
        return scored(*max(self._rows, key=lambda row: row[5].known_tokens)[5:])


def rank(candidates: Sequence[Candidate], prompt_tokens: int, hot_tokens: int = 0) -> Ranking:
    """Return the scores, best first. Ties: emptier pool, fewer running, then the name."""
    most = max([candidate.own_tokens for candidate in candidates], default=0)
    queues = [one.queue_s for one in candidates]
    rate = arrivals(candidates, queues)
    rows: list[_Row] = []
    for index, (one, queue_s) in enumerate(zip(candidates, queues, strict=True)):
        plan, others_s = price(one, queue_s, prompt_tokens, most, hot_tokens, rate)
        cost_s = plan.ttft_s + others_s
        rows.append(
            (cost_s, one.kv_used, one.running, one.name, index, one, queue_s, plan, others_s)
        )
    rows.sort()
    return Ranking(rows)
