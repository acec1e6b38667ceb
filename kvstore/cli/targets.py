"""`kvstore targets`: whose metrics can be scraped, found from what runs on this machine."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click

from kvstore.core.errors import BadInput, NotFound

_ADDRESS: Final = re.compile(r"(?:(https?)://)?(\[[0-9a-fA-F:]+\]|[\w.-]+):(\d{1,5})/?", re.ASCII)
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


def find_targets(places: Sequence[str], cluster: str, *, tls: bool = False) -> list[Target]:
    """Return what the places serve, or with none given the parts of a running cluster.

    A place is `HOST:PORT`, a URL or a node's run directory; `tls` is how those speak that do not
    say. Raises `BadInput` naming a place that is neither, `NotFound` where no such cluster runs.
    """
    found = [_at(place) for place in places] if places else _parts_of(cluster)
    return [one if one.scheme else replace(one, scheme="https" if tls else "http") for one in found]


def _at(place: str) -> Target:
    if (match := _ADDRESS.fullmatch(place)) and int(match[3]) <= 65_535:
        address = f"{match[2]}:{match[3]}"
        return Target(address, "", address, match[1] or "")
    facts = _read(Path(place) / "node.json")
    if not facts or not facts.get("metrics"):
        raise BadInput(f"{place!r} is neither HOST:PORT nor a node's run directory")
    return Target(str(facts.get("name", place)), "node", str(facts["metrics"]))


def _parts_of(cluster: str) -> list[Target]:
    if not _CLUSTER.fullmatch(cluster):
        raise BadInput(f"--cluster {cluster!r}: lower-case letters, digits and dashes, at most 32")
    note = _read(Path(f"/tmp/kvstore-{os.getuid()}") / f"up-{cluster}.json")
    parts = (note or {}).get("parts") or []
    # One file of certificates is every part's: they all speak TLS or none does.
    scheme = str((note or {}).get("http", "")).partition("://")[0]
    found = [
        Target(str(part["name"]), str(part["role"]), str(part["metrics"]), scheme)
        for part in parts
        if part.get("metrics")
    ]
    if not found:
        raise NotFound(
            f"no cluster named {cluster!r} is running here; start one with `kvstore up`, or name"
            " what to look at: HOST:PORT or a node's run directory"
        )
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@click.command(short_help="List what Prometheus should scrape, for file_sd_configs.")
@click.argument("places", nargs=-1, metavar="[HOST:PORT|RUN_DIR]...")
@click.option("--cluster", default="default", show_default=True, help="Name given to `kvstore up`.")
@click.option("--tls", is_flag=True, help="The places speak TLS: what a cluster does is known.")
def targets(places: tuple[str, ...], cluster: str, tls: bool) -> None:
    """Print scrape targets as JSON, in the form of Prometheus' file_sd_configs.

    Without places: every part of the cluster that `kvstore up` runs on this machine.
    """
    listed = [
        {
            "targets": [one.address],
            "labels": {"role": one.role, "part": one.name}
            # Prometheus' own word for it; its tls_config stands in the scrape configuration.
            | ({"__scheme__": "https"} if one.scheme == "https" else {}),
        }
        for one in find_targets(places, cluster, tls=tls)
    ]
    click.echo(json.dumps(listed, indent=2))
