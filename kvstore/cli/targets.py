"""`kvstore targets`: whose metrics can be scraped, found from what runs on this machine."""

import asyncio
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
import grpc.aio

from kvstore.core.errors import BadInput, NotFound
from kvstore.rpc.channel import open_channel
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials
from kvstore.rpc.v1 import cluster_pb2, cluster_pb2_grpc

_ADDRESS: Final = re.compile(r"(?:(https?)://)?(\[[0-9a-fA-F:]+\]|[\w.-]+):(\d{1,5})/?", re.ASCII)
_CONTROLLER: Final = "controller"
_STATUS_SECONDS: Final = 5.0
_CLUSTER: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Target:
    """One process that serves `/metrics`."""

    name: str
    role: str
    """`node`, `worker`, `frontend`, `controller`; empty where only an address was given."""
    address: str
    """`host:port`."""
    scheme: str = ""
    """`http` or `https`; empty where nobody has said."""


def find_targets(
    places: Sequence[str],
    cluster: str,
    credentials: Credentials = NO_CREDENTIALS,
    *,
    last: Sequence[Target] = (),
) -> list[Target]:
    """Return what the places serve, or with none given the parts of a running cluster.

    A place is `HOST:PORT`, a URL or a node's run directory; one that does not say speaks TLS where
    there are credentials for it. A cluster's controller is asked, since parts that were restarted
    have other ports; where it does not answer, `last` is what counts, and without it what was noted
    at the start. Raises `BadInput` naming a place that is neither, `NotFound` where no such cluster
    runs.
    """
    found = [_at(place) for place in places] if places else _parts_of(cluster, credentials, last)
    usual = "https" if credentials.ca else "http"
    return [one if one.scheme else replace(one, scheme=usual) for one in found]


def _at(place: str) -> Target:
    if (match := _ADDRESS.fullmatch(place)) and int(match[3]) <= 65_535:
        address = f"{match[2]}:{match[3]}"
        return Target(address, "", address, match[1] or "")
    facts = _read(Path(place) / "node.json")
    if not facts or not facts.get("metrics"):
        raise BadInput(f"{place!r} is neither HOST:PORT nor a node's run directory")
    return Target(str(facts.get("name", place)), "node", str(facts["metrics"]))


def _parts_of(cluster: str, credentials: Credentials, last: Sequence[Target]) -> Sequence[Target]:
    if not _CLUSTER.fullmatch(cluster):
        raise BadInput(f"--cluster {cluster!r}: lower-case letters, digits and dashes, at most 32")
    note = _read(Path(f"/tmp/kvstore-{os.getuid()}") / f"up-{cluster}.json")
    parts = (note or {}).get("parts") or []
    # One file of certificates is every part's: they all speak TLS or none does.
    scheme = str((note or {}).get("http", "")).partition("://")[0]
    found: Sequence[Target] = [
        Target(str(part["name"]), str(part["role"]), str(part["metrics"]), scheme)
        for part in parts
        if part.get("metrics")
    ]
    for part in parts:
        if part.get("role") == _CONTROLLER:
            found = _asked(str(part["address"]), scheme, credentials) or last or found
    if not found:
        raise NotFound(
            f"no cluster named {cluster!r} is running here; start one with `kvstore up`, or name"
            " what to look at: HOST:PORT or a node's run directory"
        )
    return found


def _asked(address: str, scheme: str, credentials: Credentials) -> list[Target]:
    """Return the parts that the controller knows now; none where it does not answer us."""
    try:
        status = asyncio.run(_status(address, credentials))
    except grpc.aio.AioRpcError:
        return []
    parts = [
        Target(part.name, part.role, part.metrics, scheme) for part in status.parts if part.metrics
    ]
    return [*parts, Target(_CONTROLLER, _CONTROLLER, status.metrics, scheme)]


async def _status(address: str, credentials: Credentials) -> cluster_pb2.StatusReply:
    async with open_channel(address, credentials) as channel:
        stub = cluster_pb2_grpc.ClusterStub(channel)
        reply: cluster_pb2.StatusReply = await stub.Status(
            cluster_pb2.StatusRequest(), timeout=_STATUS_SECONDS
        )
        return reply


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@click.command(short_help="List what Prometheus should scrape, for file_sd_configs.")
@click.argument("places", nargs=-1, metavar="[HOST:PORT|RUN_DIR]...")
@click.option("--cluster", default="default", show_default=True, help="Name given to `kvstore up`.")
@click.option(
    "--security", type=click.Path(path_type=Path, dir_okay=False),
    help="What to trust and to show where the parts speak TLS: docs/security.md.",
)  # fmt: skip
@click.option(
    "--follow", type=click.Path(path_type=Path, dir_okay=False),
    help="Write this file, and again whenever parts come, go or move, until Ctrl-C.",
)  # fmt: skip
@click.option(
    "--interval", type=click.FloatRange(0.1, 3_600), default=5.0, show_default=True,
    help="Seconds between two looks of --follow.",
)  # fmt: skip
def targets(
    places: tuple[str, ...], cluster: str, security: Path | None, follow: Path | None,
    interval: float,
) -> None:  # fmt: skip
    """Print scrape targets as JSON, in the form of Prometheus' file_sd_configs.

    Without places: every part of the cluster that `kvstore up` runs on this machine.
    """
    credentials = Credentials.from_file(security) if security is not None else NO_CREDENTIALS
    if follow is None:
        click.echo(_listed(find_targets(places, cluster, credentials)))
        return
    found, written = find_targets(places, cluster, credentials), ""
    while True:
        if (listed := _listed(found)) != written:
            _replace(follow, listed)
            written = listed
        time.sleep(interval)
        found = find_targets(places, cluster, credentials, last=found)


def _replace(path: Path, text: str) -> None:
    """Write a file that is never seen half; raises `BadInput` naming it."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_text(text + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise BadInput(f"--follow {path}: {error.strerror}") from error


def _listed(found: Sequence[Target]) -> str:
    """Return the targets as Prometheus reads them."""
    listed = [
        {
            "targets": [one.address],
            "labels": {"role": one.role, "part": one.name}
            # Prometheus' own word for it; its tls_config stands in the scrape configuration.
            | ({"__scheme__": "https"} if one.scheme == "https" else {}),
        }
        for one in found
    ]
    return json.dumps(listed, indent=2)
