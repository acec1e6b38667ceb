"""A start-up is shown once per change, as lines in a log and as rows on a terminal."""

import io

from kvworkers.cluster.controller import Status
from kvworkers.cluster.plan import Phase, Report, Role
from kvworkers.cluster.progress import StartProgress
from rich.console import Console
from rich.progress import Progress, TextColumn


def status(phase: Phase, detail: str = "") -> Status:
    report = Report(name="worker-0", role=Role.WORKER, phase=phase, address="h:1", detail=detail)
    return Status(parts=(report,), ready=False, hopeless="", members_version=0)


def test_a_log_gets_one_line_per_change() -> None:
    out = io.StringIO()
    progress = StartProgress(Console(file=out, width=100), None)
    for phase in (Phase.EMPTY, Phase.STARTING, Phase.STARTING, Phase.SERVING, Phase.SERVING):
        progress.show(status(phase))
    progress.show(status(Phase.FAILED, "no [such] model"))
    progress.amount("model", "Unpacking", 1, 10)
    progress.amount("model", "Unpacking", 9, 10)
    lines = [line.split("] ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines == [
        "ray: running done",
        "worker-0: process started …",
        "worker-0: starting …",
        "worker-0: serving on h:1 done",
        "worker-0: failed: no [such] model …",
        "model: Unpacking …",
    ]


def test_a_terminal_gets_one_row_per_step_with_its_amount() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    bars = Progress(TextColumn("{task.fields[step]}"), console=console)
    progress = StartProgress(console, bars)
    progress.amount("model", "Unpacking", 3, 10)
    progress.show(status(Phase.STARTING))
    progress.show(status(Phase.SERVING))
    rows = {task.fields["step"]: (task.completed, task.total) for task in bars.tasks}
    assert rows == {"model": (3, 10), "ray": (1, 1), "worker-0": (1, 1)}
