"""`kvstore status | drain | scale | restart`: what an operator asks of a running cluster."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import grpc.aio
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from kvstore.core.errors import BadInput, NotFound
from kvstore.rpc.channel import open_channel
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import cluster_pb2, cluster_pb2_grpc
from kvworkers.cluster.rundir import user_dir
from kvworkers.cluster.state import StateFile

_STATUS_SECONDS: Final = 10.0
_ORDER_SECONDS: Final = 3_600.0
"""A restart of a large cluster takes its time; an order goes on when its caller leaves."""


@dataclass(frozen=True, slots=True)
class Target:
    """Which cluster is meant, and what to show it."""

    address: str
    credentials: Credentials

    def call(self, method: str, request: Any, seconds: float) -> Any:
        """Make one call; raises our errors."""
        return asyncio.run(self._call(method, request, seconds))

    async def _call(self, method: str, request: Any, seconds: float) -> Any:
        async with open_channel(self.address, self.credentials) as channel:
            stub = cluster_pb2_grpc.ClusterStub(channel)
            try:
                return await getattr(stub, method)(request, timeout=seconds)
            except grpc.aio.AioRpcError as failure:
                raise error_from(failure) from failure


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which cluster is meant."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one line of JSON."),
        click.option(
            "--security", type=click.Path(path_type=Path, dir_okay=False),
            help="What to show the cluster: docs/security.md. [as `up` had it]",
        ),
        click.option("--control", metavar="HOST:PORT", help="The controller, instead of --name."),
        click.option("--name", default="default", show_default=True, help="As given to `up`."),
    ):  # fmt: skip
        command = option(command)
    return command


def find(name: str, control: str | None, security: Path | None) -> Target:
    """Return the cluster that is meant; raises `NotFound` where none of that name runs here."""
    credentials = Credentials.from_file(security) if security is not None else NO_CREDENTIALS
    if control is not None:
        if not control.rpartition(":")[0]:
            raise BadInput(f"--control {control!r} is not HOST:PORT")
        return Target(control, credentials)
    state = StateFile(user_dir(), name).running()
    for part in state.parts:
        if part.get("role") == "controller":
            return Target(str(part["address"]), credentials)
    raise NotFound(f"the cluster {name!r} is not ready yet")


@click.command(short_help="Show where every part of a running cluster stands.")
@target_options
def status(*, name: str, control: str | None, security: Path | None, as_json: bool) -> int:
    """Show a cluster's nodes, workers and frontends. Status 0: every part serves."""
    target = find(name, control, security)
    reply = target.call("Status", cluster_pb2.StatusRequest(), _STATUS_SECONDS)
    if as_json:
        click.echo(
            json.dumps(
                MessageToDict(
                    reply,
                    preserving_proto_field_name=True,
                    always_print_fields_with_no_presence=True,
                )
            )
        )
        return 0 if reply.ready else 1
    table = Table("part", "phase", "host", "address", "restarts", "detail", box=None)
    for part in reply.parts:
        where = part.http or part.address
        table.add_row(part.name, part.phase, part.host, where, str(part.restarts), part.detail)
    Console(soft_wrap=True).print(table)
    click.echo(reply.hopeless or reply.order or ("ready" if reply.ready else "not ready"))
    return 0 if reply.ready else 1


@click.command(short_help="Take a host out of service without failing a request.")
@click.argument("node")
@target_options
def drain(
    *, node: str, name: str, control: str | None, security: Path | None, as_json: bool
) -> int:
    """Drain the host of cache node NODE: nothing new is sent there, what runs is finished.

    Its workers and its cache end afterwards, and Ray's node can be taken away.
    """
    target = find(name, control, security)
    return _order(target, "Drain", cluster_pb2.DrainRequest(node=node), as_json=as_json)


@click.command(short_help="Change the number of workers.")
@click.argument("workers", type=click.IntRange(1))
@target_options
def scale(
    *, workers: int, name: str, control: str | None, security: Path | None, as_json: bool
) -> int:
    """Have WORKERS workers: new ones are placed where Ray has room, surplus ones are drained."""
    target = find(name, control, security)
    return _order(target, "Scale", cluster_pb2.ScaleRequest(workers=workers), as_json=as_json)


@click.command(short_help="Restart workers, caches and frontends one at a time.")
@click.argument("parts", nargs=-1)
@target_options
def restart(
    *, parts: tuple[str, ...], name: str, control: str | None, security: Path | None, as_json: bool
) -> int:
    """Restart PARTS, or every worker, then every cache node, then every frontend, each drained.

    A cache node that is restarted forgets what only its memory held. The only frontend is restarted
    only where it is named: nobody stands in for it.
    """
    target = find(name, control, security)
    return _order(target, "Restart", cluster_pb2.RestartRequest(parts=parts), as_json=as_json)


def _order(target: Target, method: str, request: Any, *, as_json: bool) -> int:
    reply = target.call(method, request, _ORDER_SECONDS)
    if as_json:
        click.echo(json.dumps({"done": list(reply.done), "seconds": round(reply.seconds, 3)}))
    else:
        done = ", ".join(reply.done) or "nothing to do"
        click.echo(f"{method.lower()}: {done} ({reply.seconds:.1f} s)")
    return 0
