"""The process that drives Ray: prepares the model, starts a cluster, holds it until told to end.

Run by the supervisor as `python -m kvworkers.cluster.session CONFIG [--model PATH] --ready-fd N`.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Final

from kvstore.core.errors import KvStoreError, Unreachable
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.launch import RunningCluster, running_cluster
from kvworkers.cluster.progress import StartProgress, start_progress
from kvworkers.cluster.supervisor import die_with_parent

_WATCH_SECONDS: Final = 1.0
_MAX_SILENT_ROUNDS: Final = 30
"""Rounds without the controller's answer before the session gives the cluster up."""


class Told(BaseException):
    """The supervisor told this session to end. Not an `Exception`: nothing may swallow it."""


@contextmanager
def session_process() -> Iterator[None]:
    """Make this process a session: it ends with its parent, and SIGTERM unwinds it in order."""
    die_with_parent()
    take_signals()
    try:
        yield
    except Told:
        sys.exit(0)
    except KvStoreError as error:
        sys.stderr.write(f"kvstore: {error}\n")
        sys.exit(1)


def take_signals() -> None:
    """Let SIGTERM raise `Told`, once: what follows the first must not break the unwinding."""

    def tell(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Told

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, tell)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def serving_cluster(config: ClusterConfig, progress: StartProgress) -> Iterator[RunningCluster]:
    """Bring a cluster up with its progress shown; yields it when everything serves."""
    progress.note("ray", "starting")
    with running_cluster(config) as cluster:
        take_signals()  # Ray has put a handler of its own in place
        cluster.wait_ready(progress.show)
        yield cluster


def prepare_model(source: str | None, progress: StartProgress) -> Path:
    """Return the model's directory, downloaded and converted if need be."""
    progress.note("model", "looking for it")
    from kvworkers.models.provision import ensure_model

    def tell(words: str, done: int, total: int) -> None:
        progress.amount("model", words, done, total)

    path = ensure_model(source, progress=tell)
    progress.note("model", f"{path.name} is ready", done=True)
    return path


def watch(cluster: RunningCluster) -> None:
    """Stay until told to end; raises `Unreachable` when the controller stays away."""
    silent = 0
    pause = threading.Event()
    while silent < _MAX_SILENT_ROUNDS:
        try:
            cluster.status()
            silent = 0
        except Unreachable:
            silent += 1
        pause.wait(_WATCH_SECONDS)
    raise Unreachable("the controller has not answered for too long; ending the cluster")


def tell_ready(descriptor: int, cluster: RunningCluster) -> None:
    """Write the endpoints to the supervisor's pipe."""
    os.write(descriptor, json.dumps(asdict(cluster.endpoints())).encode() + b"\n")
    os.close(descriptor)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the session."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--model", default=None)
    parser.add_argument("--ready-fd", type=int, required=True)
    given = parser.parse_args(arguments)
    with session_process():
        config = ClusterConfig.from_json(given.config)
        with ExitStack() as stack:
            with start_progress() as progress:
                config = config.with_model(prepare_model(given.model, progress))
                cluster = stack.enter_context(serving_cluster(config, progress))
            tell_ready(given.ready_fd, cluster)
            watch(cluster)


if __name__ == "__main__":
    main()
