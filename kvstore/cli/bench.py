"""`kvstore bench`: measurements against physical limits and peers, one JSON row a case."""

import click

from kvstore.cli.bench_router import router


@click.group(short_help="Measure against physical limits and peers.")
def bench() -> None:
    """Run benchmarks. With --json each case is one row; see docs for the fields."""


bench.add_command(router)
