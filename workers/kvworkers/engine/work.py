"""What a step computes: parts of sequences, chosen within a budget of tokens. Pure."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from kvworkers.engine.sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class Work:
    """Part of a step: compute tokens `[start, start + count)` of one sequence."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    """Whether the last of them is the last known token, so that the next one is chosen."""


def never(sequence: Sequence) -> bool:
    """Say of every sequence that no step begins behind its load."""
    return False


def plan_step(
    running: Seq[Sequence], step_tokens: int, follows: Callable[[Sequence], bool]
) -> list[Work]:
    """Choose from `running` as `Scheduler.plan` does: decodes first, then prefills in order."""
    budget = step_tokens
    ready = [
        (s, max(s.launched, s.computed), s.pending_tokens)
        for s in running
        if s.finish is None
        and (s.state is SequenceState.RUNNING or (s.gate and follows(s)))
        and not s.lacks_page
    ]
    works = [Work(s, start, 1, True) for s, start, pending in ready if pending == 1]
    budget -= len(works)
    assert budget >= 0
    for sequence, start, pending in ready:
        if pending <= 1:
            continue
        count = min(budget, pending)
        if count == 0:
            break
        works.append(Work(sequence, start, count, count == pending))
        budget -= count
    return works
