"""Shows how a start-up goes, on standard error: bars on a terminal, lines in a log.

One row per step. A step is waiting, running or done; the bar of the whole moves with the steps,
since most steps (a model's load, Ray's start) cannot be measured from outside.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from kvworkers.cluster.controller import Status
from kvworkers.cluster.plan import Phase, Report

_RAY: Final = "ray"


class StartProgress:
    """Rows of a start-up. Made by `start_progress`."""

    def __init__(self, console: Console, progress: Progress | None) -> None:
        self._console = console
        self._progress = progress
        self._begun = time.monotonic()
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, tuple[bool, str]] = {}

    def note(self, step: str, detail: str, *, done: bool = False) -> None:
        """Say where a step stands; the same words twice are shown once."""
        if self._said.get(step) == (done, detail):
            return
        self._said[step] = (done, detail)
        if self._progress is None:
            elapsed = time.monotonic() - self._begun
            mark = "done" if done else "…"
            self._console.print(f"[{elapsed:6.1f} s] {step}: {detail} {mark}", markup=False)
            return
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task("", total=None, step=step, detail=detail)
        self._progress.update(
            self._tasks[step],
            # Without a total the bar says that something moves, and does not pretend how far.
            total=1 if done else None,
            completed=1 if done else 0,
            step=step,
            detail=detail,
        )

    def amount(self, step: str, words: str, done: int, total: int) -> None:
        """Say how much of a measured step is done; `total` is 0 where that is not known."""
        if self._progress is None or not total:
            self.note(step, words)
            return
        self.note(step, words)
        self._progress.update(self._tasks[step], completed=done, total=total)

    def show(self, status: Status) -> None:
        """Show what the controller reports."""
        self.note(_RAY, "running", done=True)
        for report in status.parts:
            self.note(report.name, _words(report), done=report.phase is Phase.SERVING)


def _words(report: Report) -> str:
    match report.phase:
        case Phase.SERVING:
            return f"serving on {report.http or report.address}"
        case Phase.EMPTY:
            return "process started"
        case Phase.FAILED:
            return f"failed: {report.detail}"
        case Phase.STARTING:
            return report.detail or "starting"


@contextmanager
def start_progress() -> Iterator[StartProgress]:
    """Show a start-up until the block ends."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield StartProgress(console, None)
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("[bold]{task.fields[step]:<12}"),
        BarColumn(bar_width=16),
        TimeElapsedColumn(),
        TextColumn(
            "{task.fields[detail]}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
    )
    with Progress(*columns, console=console) as progress:
        yield StartProgress(console, progress)
