"""`kvstore simulate`: replays traces through the classes that run in production."""

import click

from kvstore.cli.simulate_evict import evict
from kvstore.cli.simulate_route import route
from kvstore.cli.simulate_tiers import tiers


@click.group(short_help="Replay traces through the production policies.")
def simulate() -> None:
    """Replay traces of prefix blocks through the classes that run in production.

    A TRACE is JSONL, plain or gzip: the fields of docs/simulate.md, Mooncake's, Dynamo's, or a
    recording of `kvstore record`.
    """


simulate.add_command(evict)
simulate.add_command(route)
simulate.add_command(tiers)
