"""A bar on standard error for work of known length, cheap enough to be told every step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_STEPS: Final = 256
"""Steps between two updates: an update costs tens of microseconds."""


class Steps:
    """Counts steps of one part of the work and moves the bar now and then."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._pending = 0

    def begin(self, what: str, total: int) -> None:
        """Start a part of `total` steps."""
        self._pending = 0
        self._progress.reset(self._task, total=total, description=what)

    def step(self) -> None:
        """Note one step."""
        self._pending += 1
        if self._pending == _STEPS:
            self._progress.advance(self._task, _STEPS)
            self._pending = 0


@contextmanager
def steps_shown() -> Iterator[Steps]:
    """Show a bar while the block runs, on a terminal only; it leaves nothing behind."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        yield Steps(progress, progress.add_task("", total=None))
