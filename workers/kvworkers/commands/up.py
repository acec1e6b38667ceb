"""`kvstore up`: a cluster on this machine, in the foreground or detached."""

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from kvstore.cli.values import ROOM
from kvstore.core.errors import Unreachable
from kvstore.core.names import Fidelity
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.declared import load_declared
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
    make_directory,
    refuse_with_config,
    role_options,
    scope_options,
    with_free_ports,
)

_READY_SECONDS: Final = 900.0
"""`--detach` waits this long: a first start downloads and converts a model."""

_SAME_NAMES: Final = (
    "workers", "prefill", "decode", "threads", "policy", "nvme", "files", "http", "grpc",
    "frontends", "listen", "tensor_parallel", "security", "ray_namespace", "drain_ms", "trace",
    "events_redis", "fidelity", "overcommit",
)  # fmt: skip
"""Flags that are called as the fields of `ClusterConfig`."""

_LOG_POLL_SECONDS: Final = 0.2


@click.command(short_help="Start a cluster on this machine: node, workers, router, frontends.")
@cluster_options
@address_options("127.0.0.1:8000")
@scope_options
@role_options
@click.option("--name", default="default", show_default=True, help="For `down` and `chat`.")
@click.option("--fidelity", type=click.Choice([f.value for f in Fidelity]), default="exact",
              show_default=True, help="How exactly workers' stores keep K and V.")  # fmt: skip
@click.option("--tensor-parallel", default=1, show_default=True, help="Devices of each worker.")
@click.option("--swap", type=ROOM, default=None,
              help="Arena for requests that make way. [default: as nodes allow]")  # fmt: skip
@click.option("--overcommit/--no-overcommit", default=True, show_default=True,
              help="Admit by what replies are expected to be, not by all they may.")  # fmt: skip
@click.option("--detach", is_flag=True, help="Return when ready; end it with `kvstore down`.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when ready.")
@click.option("--notify-fd", type=int, hidden=True, default=None)
def up(
    *,
    config_file: Path | None,
    model: str | None,
    name: str,
    detach: bool,
    as_json: bool,
    notify_fd: int | None,
    **options: Any,
) -> int:
    """Start a cluster that serves a model with its cache: a Ray of its own on this machine, or
    on a Ray cluster that runs already (--address auto).

    Runs until Ctrl-C, or in the background with --detach. The first start prepares the model.
    """
    if config_file is not None:
        refuse_with_config(click.get_current_context())
        declared = load_declared(config_file)
        name, model, config = declared.name, declared.model or None, declared.config
    else:
        config = _from_flags(model, options)
    state_file = StateFile(user_dir(), name)
    config = with_free_ports(config)
    if not config.ray_address:
        check_memory(config.arena_bytes)
        make_directory("--nvme", config.nvme)
        make_directory("--files", config.files)
    if detach:
        return _detach(state_file, as_json=as_json)
    return _hold(config, model, state_file, as_json=as_json, notify_fd=notify_fd)


def _from_flags(model: str | None, options: Mapping[str, Any]) -> ClusterConfig:
    """Return the cluster that the flags of the command line describe."""
    return ClusterConfig(
        model=Path(model or "."),
        run_dir=Path("/"),
        arena_bytes=options["arena"],
        pool_bytes=options["pool"] or 0,
        swap_bytes=options["swap"],
        nvme_bytes=options["nvme_bytes"] or 0,
        files_bytes=options["files_bytes"] or 0,
        cluster_key=options["cluster_key_file"],
        ray_address=options["address"],
        spare_cpus=options["spare"],
        **{field: options[field] for field in _SAME_NAMES},
    )


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
