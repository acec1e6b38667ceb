"""`kvstore top`: what a cluster holds and does, live in a terminal or once for scripts."""

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.live import Live

from kvstore.cli.scrape import Figures, fetch
from kvstore.cli.targets import Target, find_targets
from kvstore.cli.top_view import draw, summarise
from kvstore.core.errors import Unreachable
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials

_AT_ONCE: Final = 16
_PLAIN_WIDTH: Final = 120


@click.command(short_help="Watch tiers, hit rates, workers and domains in the terminal.")
@click.argument("places", nargs=-1, metavar="[HOST:PORT|RUN_DIR]...")
@click.option("--cluster", default="default", show_default=True, help="Name given to `kvstore up`.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3_600),
    default=2.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option(
    "--security", type=click.Path(path_type=Path, dir_okay=False),
    help="What to trust and to show where the parts speak TLS: docs/security.md.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print one look, since the processes' start, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print every look as one line of JSON.")
def top(
    *, places: tuple[str, ...], cluster: str, interval: float, security: Path | None, once: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Show tiers, hit rates, workers and share domains, until Ctrl-C.

    Places are metrics addresses (HOST:PORT) or run directories of nodes; without any, the
    cluster that `kvstore up` runs on this machine. Fails when nothing at all answers.
    """
    credentials = Credentials.from_file(security) if security is not None else NO_CREDENTIALS
    again = _Looker(places, cluster, credentials)
    pages, unreachable = again()
    if not pages:
        raise Unreachable("; ".join(unreachable))
    if once:
        _print(pages, {}, None, unreachable, as_json=as_json)
        return
    if as_json or not sys.stdout.isatty():
        _follow(again, pages, interval, as_json=as_json)
    else:
        _live(again, pages, unreachable, interval)


class _Looker:
    """Looks at all parts, wherever they are by then."""

    def __init__(self, places: Sequence[str], cluster: str, credentials: Credentials) -> None:
        self._places = places
        self._cluster = cluster
        self._credentials = credentials
        self._last: list[Target] = []

    def __call__(self) -> tuple[dict[Target, Figures], list[str]]:
        """Return every page that answers, and a line for every other part."""
        found = find_targets(self._places, self._cluster, self._credentials, last=self._last)
        self._last = found
        return look(found, self._credentials)


def look(
    targets: Sequence[Target], credentials: Credentials = NO_CREDENTIALS
) -> tuple[dict[Target, Figures], list[str]]:
    """Return every page that answers, and a line for every other target."""
    pages: dict[Target, Figures] = {}
    unreachable: list[str] = []
    with ThreadPoolExecutor(min(_AT_ONCE, len(targets))) as pool:
        answers = pool.map(partial(_fetch, credentials=credentials), targets)
        for target, page in zip(targets, answers, strict=True):
            if isinstance(page, Figures):
                pages[target] = page
            else:
                unreachable.append(page)
    return pages, unreachable


def _fetch(target: Target, credentials: Credentials) -> Figures | str:
    try:
        return fetch(target, credentials)
    except Unreachable as error:
        return str(error)


def _follow(
    again: _Looker,
    before: dict[Target, Figures],
    interval: float,
    *,
    as_json: bool,
) -> None:
    last = time.monotonic()
    while True:
        time.sleep(interval)
        pages, unreachable = again()
        now = time.monotonic()
        _print(pages, before, now - last, unreachable, as_json=as_json)
        before, last = pages, now


def _live(
    again: _Looker,
    before: dict[Target, Figures],
    unreachable: list[str],
    interval: float,
) -> None:
    last = time.monotonic()
    first = draw(summarise(before, {}, None), unreachable)
    with Live(first, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            pages, unreachable = again()
            now = time.monotonic()
            live.update(draw(summarise(pages, before, now - last), unreachable), refresh=True)
            before, last = pages, now


def _print(
    pages: dict[Target, Figures],
    before: dict[Target, Figures],
    seconds: float | None,
    unreachable: list[str],
    *,
    as_json: bool,
) -> None:
    summary = summarise(pages, before, seconds)
    if as_json:
        click.echo(json.dumps(summary | {"unreachable": unreachable}))
    else:
        width = None if sys.stdout.isatty() else _PLAIN_WIDTH
        Console(file=sys.stdout, width=width, highlight=False).print(draw(summary, unreachable))
    sys.stdout.flush()
