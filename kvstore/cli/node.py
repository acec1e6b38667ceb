"""`kvstore node`: a keeper and its cache node on this host, in the foreground."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from kvstore.cli.inspection import inspect
from kvstore.cli.values import BYTES, QUOTA
from kvstore.directory.policies import DEFAULT_POLICY, POLICIES
from kvstore.service.config import KeeperConfig
from kvstore.service.keeper import run_keeper


@click.group(
    invoke_without_command=True,
    subcommand_metavar="[inspect ...]",
    short_help="Run this host's cache: a keeper and its cache node.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of sockets, node.json and the cluster key; made with mode 0700.",
)
@click.option("--name", default="node", show_default=True, help="Name of this node.")
@click.option(
    "--arena-bytes",
    type=BYTES,
    default="1GiB",
    show_default=True,
    help="Memory for blocks.",
)
@click.option(
    "--nvme",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory on a local disk for blocks that outlive the process; one node's own.",
)
@click.option("--nvme-bytes", type=BYTES, default=None, help="Bytes that --nvme may take.")
@click.option(
    "--files",
    type=click.Path(path_type=Path, file_okay=False),
    help="Shared directory for blocks that outlive the cluster; many nodes may use one.",
)
@click.option("--files-bytes", type=BYTES, default=None, help="Bytes that all blocks there take.")
@click.option("--listen", default="127.0.0.1:0", show_default=True, help="gRPC over TCP.")
@click.option(
    "--bulk", default="127.0.0.1:0", show_default=True, help="Bytes for those without the arena."
)
@click.option(
    "--peers",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File that lists the other nodes, read again when it changes: docs/tiers.md.",
)
@click.option("--metrics", default="127.0.0.1:0", show_default=True, help="GET /metrics.")
@click.option(
    "--security",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Who may connect, and with what proof: docs/security.md. [loopback only]",
)
@click.option(
    "--cluster-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="32 secret bytes that names are derived with; made where missing. [RUN_DIR/cluster.key]",
)
@click.option("--parent-pid", type=int, default=0, help="End when this process ends.")
@click.option(
    "--lease-ms",
    type=click.IntRange(10),
    default=30_000,
    show_default=True,
    help="Leases live this long unless released.",
)
@click.option(
    "--claim-ms",
    type=click.IntRange(0),
    default=5_000,
    show_default=True,
    help="After this long another session may compute a block that one has claimed.",
)
@click.option(
    "--policy",
    type=click.Choice(list(POLICIES)),
    default=DEFAULT_POLICY,
    show_default=True,
    help="What to evict and what to admit: docs/policy.md.",
)
@click.option(
    "--events-redis",
    default="",
    metavar="URL",
    help="Redis or Valkey to write events to, besides serving Watch.",
)
@click.option(
    "--hang-ms",
    type=click.IntRange(100),
    default=10_000,
    show_default=True,
    help="Replace a node that answers nothing for this long.",
)
@click.option(
    "--max-sessions",
    type=click.IntRange(1),
    default=1_024,
    show_default=True,
    help="Clients at once; more are refused.",
)
@click.option(
    "--trace", default="", metavar="URL", help="Send spans to this OTLP collector: docs/tracing.md."
)
@click.option(
    "--scrub-bytes-per-s",
    type=BYTES,
    default="64MiB",
    show_default=True,
    help="How fast idle blocks in memory are reread to find bad bytes; 0B: not at all.",
)
@click.option(
    "--numa",
    default="auto",
    show_default=True,
    metavar="NODES",
    help="NUMA nodes to put the arena on, such as 0-1; auto: all in turn, where there are several.",
)
@click.option(
    "--quota",
    "quotas",
    type=QUOTA,
    multiple=True,
    metavar="RULE",
    help="Bytes one share domain or root may hold, as domain:NAME:dram=8GiB,nvme=1TiB; NAME * is"
    " each other one. May be repeated: docs/tiers.md.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when ready.")
def node(as_json: bool, **options: Any) -> None:
    """Run this host's cache: a keeper, which owns the memory, and the cache node.

    Workers and clients of this host open sessions on RUN_DIR/keeper.sock. The node is restarted
    when it dies; blocks survive that. Ends on SIGTERM or Ctrl-C.
    """
    context = click.get_current_context()
    if context.invoked_subcommand is not None:
        return
    if options["run_dir"] is None:
        raise click.UsageError("Missing option '--run-dir'.", context)
    config = KeeperConfig(
        **{**options, **{key: options[key] or 0 for key in ("nvme_bytes", "files_bytes")}}
    )

    def ready(described: dict[str, Any]) -> None:
        if as_json:
            click.echo(json.dumps(described))
        else:
            click.echo(f"{described['name']}: ready on {described['listen']}, sessions on "
                       f"{described['keeper_socket']}", err=True)  # fmt: skip
        sys.stdout.flush()

    run_keeper(config, on_ready=ready, on_progress=_Progress(config.name))


node.add_command(inspect)


class _Progress:
    """Prints how much of the arena is touched: a bar on a terminal, else a line per tenth."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._printed = 0

    def __call__(self, done: int, total: int) -> None:
        tenth = done * 10 // total
        if tenth == self._printed:
            return
        self._printed = tenth
        bar = "#" * tenth + "." * (10 - tenth)
        line = f"[{self._name}] arena [{bar}] {done >> 20} of {total >> 20} MiB"
        terminal = sys.stderr.isatty()
        click.echo(f"\r{line}" if terminal else line, nl=not terminal or done == total, err=True)
