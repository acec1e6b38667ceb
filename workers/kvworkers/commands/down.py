"""`kvstore down`: end a cluster that `kvstore up` started."""

import os
import select
import signal
from contextlib import suppress
from typing import Final

import click

from kvstore.core.errors import NotFound, Unreachable
from kvworkers.cluster.rundir import user_dir
from kvworkers.cluster.state import StateFile, started_ticks
from kvworkers.cluster.supervisor import GRACE_SECONDS

_SLACK_SECONDS: Final = 20.0
"""Beyond the session's grace: ending leftovers, then removing the run directory."""


@click.command(short_help="End a cluster that `kvstore up` started.")
@click.option("--name", default="default", show_default=True, help="As given to `kvstore up`.")
def down(*, name: str) -> int:
    """End a running cluster in good order and wait until its last process is gone."""
    state_file = StateFile(user_dir(), name)
    try:
        state = state_file.running()
    except NotFound as error:
        click.echo(f"kvstore: {error}", err=True)
        return 1
    _end(state.pid, state.started, seconds=GRACE_SECONDS + _SLACK_SECONDS)
    state_file.drop(state)
    click.echo(f"The cluster {name!r} has ended.")
    return 0


def _end(pid: int, started: int, *, seconds: float) -> None:
    """Tell a supervisor to end and wait for it; raises `Unreachable` when it does not."""
    with suppress(ProcessLookupError):
        # The pidfd holds the very process: after the check its number cannot become a stranger's.
        handle = os.pidfd_open(pid)
        try:
            if started_ticks(pid) != started:
                return
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            if not select.select([handle], [], [], seconds)[0]:
                raise Unreachable(f"process {pid} did not end in {seconds:.0f} s")
        finally:
            os.close(handle)
