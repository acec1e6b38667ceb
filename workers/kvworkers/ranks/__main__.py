"""`python -m kvworkers.ranks`: one of the other ranks of a worker, started by its rank 0."""

import asyncio
import logging
import signal
import sys

import click

from kvworkers.ranks.follower import obey


@click.command()
@click.option("--lead", required=True, help="The Unix socket that rank 0 listens on.")
@click.option("--rank", type=int, required=True)
def main(lead: str, rank: int) -> None:
    """Compute one part of a model until rank 0 ends."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Meant for all processes of a terminal or a service: rank 0 drains, and ends this one then.
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(obey(lead, rank))


if __name__ == "__main__":
    main()
