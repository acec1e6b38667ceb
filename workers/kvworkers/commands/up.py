"""`kvstore up`: a cluster on this machine, in the foreground or detached."""

import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import click

from kvstore.cli.values import Address
from kvstore.core.errors import Unreachable
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.rundir import new_run_dir, user_dir
from kvworkers.cluster.state import State, StateFile
from kvworkers.cluster.supervisor import (
    EXIT_INTERRUPTED,
    GRACE_SECONDS,
    Ended,
    session_command,
    supervise,
)
from kvworkers.commands.options import (
    address_options,
    check_memory,
    clear,
    cluster_options,
    free_address,
    make_directory,
)

_READY_SECONDS: Final = 900.0
"""`--detach` waits this long: a first start downloads and converts a model."""

_LOG_POLL_SECONDS: Final = 0.2


@click.command(short_help="Start a cluster on this machine: node, workers, router, frontends.")
@cluster_options
@address_options("127.0.0.1:8000")
@click.option("--name", default="default", show_default=True, help="For `down` and `chat`.")
@click.option("--detach", is_flag=True, help="Return when ready; end it with `kvstore down`.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when ready.")
@click.option("--notify-fd", type=int, hidden=True, default=None)
def up(
    *,
    model: str | None,
    workers: int,
    arena: int,
    pool: int | None,
    threads: int,
    policy: str,
    nvme: Path | None,
    nvme_bytes: int | None,
    events_redis: str,
    http: Address,
    grpc: Address,
    name: str,
    detach: bool,
    as_json: bool,
    notify_fd: int | None,
) -> int:
    """Start a Ray cluster on this machine and serve a model with its cache.

    Runs until Ctrl-C, or in the background with --detach. The first start prepares the model.
    """
    state_file = StateFile(user_dir(), name)
    http, grpc = free_address("--http", http), free_address("--grpc", grpc)
    check_memory(arena)
    make_directory("--nvme", nvme)
    config = ClusterConfig(
        model=Path(model or "."),
        run_dir=Path("/"),
        workers=workers,
        arena_bytes=arena,
        pool_bytes=pool or 0,
        threads=threads,
        policy=policy,
        nvme=nvme,
        nvme_bytes=nvme_bytes or 0,
        events_redis=events_redis,
        http=http,
        grpc=grpc,
    )
    if detach:
        return _detach(state_file, as_json=as_json)
    return _hold(config, model, state_file, as_json=as_json, notify_fd=notify_fd)


def _hold(
    config: ClusterConfig,
    model: str | None,
    state_file: StateFile,
    *,
    as_json: bool,
    notify_fd: int | None,
) -> int:
    """Run the cluster until it is told to end, with a note for `down` and `chat`."""
    run_dir = new_run_dir()
    log = str(_log_path(state_file)) if notify_fd is not None else ""
    try:
        state = state_file.claim(run_dir, log)
    except BaseException:
        run_dir.rmdir()
        raise
    ready = False

    def on_ready(facts: dict[str, Any]) -> None:
        nonlocal ready, state
        ready = True
        state = state.with_endpoints(**facts)
        state_file.write(state)
        if notify_fd is not None:
            os.write(notify_fd, b"ready\n")
        else:
            _announce(state, as_json=as_json)

    command = session_command(
        "kvworkers.cluster.session",
        config.at(run_dir).to_json(),
        *(("--model", model) if model else ()),
    )
    ended = Ended(1, interrupted=False, leftovers=0)
    try:
        ended = supervise(command, on_ready=on_ready)
    finally:
        state_file.drop(state)
        clear(run_dir, keep_logs=not ended.interrupted)
    if ended.interrupted:
        click.echo("kvstore: the cluster has ended", err=True)
        return 0 if ready else EXIT_INTERRUPTED
    return 1


def _detach(state_file: StateFile, *, as_json: bool) -> int:
    """Run the same command in the background; return when it is ready or has failed."""
    read, write = os.pipe2(os.O_CLOEXEC)
    log = _log_path(state_file)
    arguments = [word for word in sys.argv[1:] if word not in ("--detach", "--json")]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvstore.cli.main", *arguments, "--notify-fd", str(write)],
            start_new_session=True,
            pass_fds=(write,),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    os.close(write)
    try:
        word = _follow_log(read, log)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait(GRACE_SECONDS + 10)
        raise
    finally:
        os.close(read)
    if word != b"ready\n":
        status = process.wait(GRACE_SECONDS + 10)
        click.echo(f"kvstore: the cluster did not come up (log: {log})", err=True)
        return status or 1
    _announce(state_file.running(), as_json=as_json)
    return 0


def _follow_log(ready: int, log: Path) -> bytes:
    """Copy the log to standard error until the pipe says ready or closes; return its word."""
    rounds = int(_READY_SECONDS / _LOG_POLL_SECONDS)
    with log.open("rb") as lines, selectors.DefaultSelector() as selector:
        selector.register(ready, selectors.EVENT_READ)
        for _ in range(rounds):
            told = selector.select(_LOG_POLL_SECONDS)
            sys.stderr.buffer.write(lines.read())
            sys.stderr.buffer.flush()
            if told:
                return os.read(ready, 64)
    raise Unreachable(f"the cluster was not ready in {_READY_SECONDS:.0f} s (log: {log})")


def _log_path(state_file: StateFile) -> Path:
    return state_file.path.with_suffix(".log")


def _announce(state: State, *, as_json: bool) -> None:
    """Say where the cluster is and how to talk to it."""
    if as_json:
        fields = ("name", "http", "grpc", "model", "pid", "run_dir", "log", "parts")
        click.echo(json.dumps({field: getattr(state, field) for field in fields}))
        return
    click.secho("\nThe cluster is ready.", fg="green", bold=True)
    question = {"role": "user", "content": "What is a cache?"}
    example = json.dumps({"model": state.model, "stream": True, "messages": [question]})
    name = "" if state.name == "default" else f" --name {state.name}"
    click.echo(
        f"  HTTP   {state.http}/v1   (OpenAI-compatible; metrics at {state.http}/metrics)\n"
        f"  gRPC   {state.grpc}   (kvstore.rpc.v1.Inference)\n\n"
        f"  kvstore chat{name}\n"
        f"  curl -N {state.http}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"    -d '{example}'\n"
    )
    click.echo(f"  End it with kvstore down{name}." if state.log else "  End it with Ctrl-C.")
