"""Starts scripts as processes for a test and ends them by their pid."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE_S

REPOSITORY = Path(__file__).parents[1]


@dataclass
class Started:
    """A process that printed its ready line."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)


@contextmanager
def started(arguments: Sequence[str]) -> Iterator[Started]:
    """Run `python ARGUMENTS…` until the block ends; the first line it prints is JSON."""
    paths = [str(REPOSITORY / part) for part in ("", "workers", "kernels")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"{arguments} ended with {process.wait(PATIENCE_S)} before it was ready"
        yield Started(process, json.loads(line))
    finally:
        process.kill()
        process.send_signal(signal.SIGCONT)
        process.wait(PATIENCE_S)
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def scripted(name: str, *arguments: str) -> Iterator[Started]:
    """Run a scripted worker or node as a process."""
    script = str(REPOSITORY / "tests" / "scripted_worker.py")
    with started([script, "--name", name, *arguments]) as process:
        yield process
