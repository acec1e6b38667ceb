"""Arguments and answers of calls, checked the same way whoever makes the call."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from kvstore.client.config import check_deadline
from kvstore.client.replies import SlotRef
from kvstore.core.errors import BadInput, Unreachable
from kvstore.core.outcomes import SettleOutcome

_Result = TypeVar("_Result")


def deadline(asked: int | None, default: int) -> int:
    """Return the deadline of a call in milliseconds; raises `BadInput` for an absurd one."""
    return default if asked is None else check_deadline("deadline_ms", asked)


def bounded(name: str, value: int, most: int) -> None:
    """Raise `BadInput` naming an argument that is not between 0 and `most`."""
    if not 0 <= value <= most:
        raise BadInput(f"{name} is {value}; 0 to {most} allowed")


def lease(value: int) -> None:
    """Raise `BadInput` for what cannot be a lease, which on the wire is 64 bits without a sign."""
    if not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise BadInput(f"not a lease: {value!r}")


def read(convert: Callable[..., _Result], *arguments: object) -> _Result:
    """Read an answer; one that this build cannot understand is as good as none."""
    try:
        return convert(*arguments)
    except (BadInput, ValueError) as error:
        raise Unreachable(f"the cache node's answer is malformed: {error}") from error


def with_stale(
    asked: Sequence[SlotRef], answered: Sequence[SettleOutcome], arena: int
) -> list[SettleOutcome]:
    """Put STALE where a slot was of an earlier arena and hence not sent."""
    if len(answered) == len(asked):
        return list(answered)
    answers = iter(answered)
    return [next(answers) if ref.arena == arena else SettleOutcome.STALE for ref in asked]
