"""Options that `up` and `demo` share, and what both do around a session."""

import random
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click

from kvstore.cli.values import ADDRESS, BYTES, Address
from kvstore.core.errors import BadInput
from kvstore.directory.policies import DEFAULT_POLICY, POLICIES
from kvworkers.cluster.config import ClusterConfig

_OUR_PORTS: Final = range(20_000, 32_000)
_PORT_TRIES: Final = 32


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what a cluster is."""
    for option in reversed(
        (
            click.option(
                "--model",
                metavar="PATH",
                help="A Hugging Face directory or a GGUF file. [default: SmolLM2-135M-Instruct]",
            ),
            click.option("--workers", default=2, show_default=True, help="One per device."),
            click.option(
                "--arena",
                type=BYTES,
                default="1GiB",
                show_default=True,
                help="Host memory for cached blocks, shared by the workers.",
            ),
            click.option(
                "--nvme",
                type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
                help="Directory on a local disk for blocks that outlive the cluster.",
            ),
            click.option(
                "--nvme-bytes",
                type=BYTES,
                default=None,
                help="Bytes that --nvme may take per node.",
            ),
            click.option(
                "--pool",
                type=BYTES,
                default=None,
                help="Each worker's own pages. [default: what a GPU has room for; 512MiB on a CPU]",
            ),
            click.option(
                "--policy",
                type=click.Choice(list(POLICIES)),
                default=DEFAULT_POLICY,
                show_default=True,
                help="What to evict and what to admit, in every tier.",
            ),
            click.option("--events-redis", default="", metavar="URL", help="To carry events."),
            click.option("--threads", default=0, help="Of each worker. [default: cores/workers]"),
        )
    ):
        command = option(command)
    return command


def scope_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a cluster that is more than one machine's, or more than its user's."""
    for option in (
        click.option(
            "--config", "config_file", type=click.Path(path_type=Path, dir_okay=False),
            help="The whole cluster declared in YAML: docs/deploy.md.",
        ),
        click.option(
            "--drain-ms", default=30_000, show_default=True,
            help="How long a worker or frontend that is drained may finish what it runs.",
        ),
        click.option(
            "--spare", default=0, show_default=True,
            help="Places beyond --workers that `kvstore scale` may use, on a Ray of our own.",
        ),
        click.option(
            "--ray-namespace", default="kvstore", show_default=True,
            help="Separates clusters of ours on one Ray cluster.",
        ),
        click.option(
            "--address", default="", metavar="auto|HOST:PORT",
            help="Join this Ray cluster. [a Ray of our own on this machine]",
        ),
        click.option(
            "--security", type=click.Path(path_type=Path, dir_okay=False, resolve_path=True),
            help="Who may connect, and with what proof: docs/security.md.",
        ),
        click.option(
            "--files", type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
            help="Directory that all nodes share, for blocks that outlive the cluster.",
        ),
        click.option(
            "--files-bytes", type=BYTES, default=None, help="Bytes that all blocks there take.",
        ),
        click.option(
            "--cluster-key-file",
            type=click.Path(path_type=Path, dir_okay=False, resolve_path=True),
            help="Secret that names are derived with, the same on every host. [made for one host]",
        ),
        click.option(
            "--trace", default="", metavar="URL", help="Send spans to this OTLP collector.",
        ),
        click.option(
            "--listen", type=click.Choice(["loopback", "host"]), default="loopback",
            show_default=True, help="Where nodes, workers and controller listen.",
        ),
        click.option("--frontends", default=1, show_default=True, help="HTTP and gRPC servers."),
    ):  # fmt: skip
        command = option(command)
    return command


def role_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what workers are there for."""
    for option in (
        click.option(
            "--decode", default=0, show_default=True,
            help="Workers that are kept free for answers: docs/worker.md.",
        ),
        click.option(
            "--prefill", default=0, show_default=True,
            help="Workers that compute prompts for the others of their host.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


_WITH_CONFIG: Final = frozenset({"config_file", "detach", "as_json", "notify_fd"})


def refuse_with_config(context: click.Context) -> None:
    """Raise `BadInput` where a flag says what the file of --config says."""
    for parameter in context.command.params:
        said = context.get_parameter_source(parameter.name or "")
        if said is click.core.ParameterSource.COMMANDLINE and parameter.name not in _WITH_CONFIG:
            raise BadInput(f"{parameter.opts[0]} and --config exclude each other: write it there")


def with_free_ports(config: ClusterConfig) -> ClusterConfig:
    """Return the cluster with real ports, which restarted parts come back to.

    On a Ray cluster of many hosts nobody can look: there the ports have to be named.
    """
    if config.ray_address and not (config.http.port and config.grpc.port):
        raise BadInput("--address needs ports: name them in --http and --grpc")
    changes: dict[str, Any] = {}
    for flag, field in (("--http", "http"), ("--grpc", "grpc")):
        given: Address = getattr(config, field)
        if not config.ray_address:
            changes[field] = free_address(flag, given)
    if not config.control_port:
        changes["control_port"] = free_address("--control-port", Address("127.0.0.1", 0)).port
    return replace(config, **changes)


def address_options(http: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options that say where the frontends listen."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option(
                "--grpc",
                type=ADDRESS,
                default="127.0.0.1:0",
                show_default=True,
                help="Where the gRPC API listens; port 0 takes a free one.",
            ),
            click.option(
                "--http",
                type=ADDRESS,
                default=http,
                show_default=True,
                help="Where the OpenAI-compatible API listens.",
            ),
        ):
            command = option(command)
        return command

    return add


def free_address(flag: str, address: Address) -> Address:
    """Return `address` with a real port where it asks for any free one.

    A frontend that is restarted must come back to the same port, so it is chosen here, below the
    range that the kernel and Ray take ports from. Raises `BadInput` naming the flag whose address
    cannot be bound: minutes of start-up later the same fault would be an actor's failure.
    """
    if address.port:
        _try_to_bind(flag, address)
        return address
    for port in random.sample(_OUR_PORTS, k=_PORT_TRIES - 1):
        with suppress(BadInput):
            _try_to_bind(flag, Address(address.host, port))
            return Address(address.host, port)
    _try_to_bind(flag, address)  # says what is wrong with the host
    raise BadInput(f"{flag} {address}: found no free port; name one")


def _try_to_bind(flag: str, address: Address) -> None:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host.strip("[]"), address.port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise BadInput(
                f"{flag} {address}: {reason}; choose another port or 0 for a free one"
            ) from error


def check_memory(arena_bytes: int) -> None:
    """Raise `BadInput` where the arena would not fit into the free memory."""
    available = _available_bytes()
    if available and arena_bytes > available:
        raise BadInput(f"--arena {arena_bytes}: only {available} bytes of memory are free")


def make_directory(flag: str, path: Path | None) -> None:
    """Make a directory where it is missing; `BadInput` naming the flag when that cannot be."""
    if path is None:
        return
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{flag} {path}: {error.strerror}") from error


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def clear(run_dir: Path, *, keep_logs: bool) -> None:
    """Remove a cluster's directory, or say where its logs are."""
    if keep_logs:
        click.echo(f"kvstore: logs are kept in {run_dir}", err=True)
    else:
        shutil.rmtree(run_dir, ignore_errors=True)
