"""`kvstore demo`: a local cluster, real conversations out of its cache, and the proof."""

from pathlib import Path

import click

from kvstore.cli.values import Address
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.rundir import new_run_dir
from kvworkers.cluster.supervisor import EXIT_INTERRUPTED, session_command, supervise
from kvworkers.commands.options import (
    address_options,
    check_memory,
    clear,
    cluster_options,
    free_address,
    make_directory,
)
from kvworkers.demo.script import conversations


@click.command(short_help="Start a cluster, hold real conversations, check every reply.")
@click.option("--clients", default=4, show_default=True, help="Conversations at once.")
@click.option("--turns", default=3, show_default=True, help="Questions per conversation.")
@cluster_options
@address_options("127.0.0.1:0")
@click.option("--json", "as_json", is_flag=True, help="One line per request, then a summary.")
def demo(
    *,
    clients: int, turns: int, model: str | None, workers: int, arena: int, pool: int | None,
    threads: int, policy: str, nvme: Path | None, nvme_bytes: int | None, http: Address,
    grpc: Address, events_redis: str, as_json: bool,
) -> int:  # fmt: skip
    """Show the whole service at work on this machine.

    Starts a cluster, lets clients hold conversations that share a long system prompt and
    documents, prints where every prompt token came from and how soon the first token was there, and
    checks each reply against the same model without any cache. Exit status 0 only if all are equal.
    """
    conversations(clients, turns)  # refuses what cannot be asked, before anything starts
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
    run_dir = new_run_dir()
    command = session_command(
        "kvworkers.demo.session",
        config.at(run_dir).to_json(),
        *(("--model", model) if model else ()),
        *("--clients", str(clients), "--turns", str(turns)),
        *(("--json",) if as_json else ()),
    )
    keep_logs = True
    try:
        ended = supervise(command)
        keep_logs = ended.status != 0 and not ended.interrupted
    finally:
        clear(run_dir, keep_logs=keep_logs)
    if ended.interrupted:
        click.echo("kvstore: interrupted; every process has ended", err=True)
        return EXIT_INTERRUPTED
    return ended.status
