"""Options that `up` and `demo` share, and what both do around a session."""

import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from kvstore.cli.values import ADDRESS, BYTES, Address
from kvstore.core.errors import BadInput


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
                "--pool",
                type=BYTES,
                default=None,
                help="Each worker's own pages. [default: 512MiB]",
            ),
            click.option(
                "--threads", default=0, help="Compute threads per worker. [default: cores/workers]"
            ),
        )
    ):
        command = option(command)
    return command


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


def check_free(flags: Sequence[tuple[str, Address]]) -> None:
    """Raise `BadInput` naming the flag whose address cannot be bound; minutes of start-up later
    the same fault would be an actor's failure."""
    for flag, address in flags:
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
