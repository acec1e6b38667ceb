"""`kvstore simulate route`: routers on traces, ours and the published ones."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from kvstore.cli.progress import Steps, steps_shown
from kvstore.directory.policies import DEFAULT_POLICY, POLICIES
from kvstore.simulate.formats import read_trace
from kvstore.simulate.prices import Prices
from kvstore.simulate.route import MAX_WORKERS, RouteResult, Setup, replay_route
from kvstore.simulate.route_routers import make_router, router_names
from kvstore.simulate.trace import Trace

_RATE: Final = click.FloatRange(0, min_open=True)
_NOT_NEGATIVE: Final = click.FloatRange(0)


@dataclass(frozen=True, slots=True)
class Row:
    """One result, as DESIGN names its fields; hit and pool are shares, 0 to 1."""

    trace: str
    router: str
    workers: int
    pool: float
    result: RouteResult

    def as_json(self) -> str:
        """Return the row as one line."""
        result = self.result
        return json.dumps(
            {
                "trace": self.trace,
                "router": self.router,
                "workers": self.workers,
                "pool": self.pool,
                "token_hit": round(result.token_hit, 6),
                "imbalance": round(result.imbalance, 4),
                "ttft_mean_s": round(result.ttft_mean_s, 4),
                "ttft_p50_s": round(result.ttft_p50_s, 4),
                "ttft_p99_s": round(result.ttft_p99_s, 4),
            }
        )


@click.command(short_help="Routers' hits, balance and time to first token.")
@click.argument(
    "traces", metavar="TRACE…", nargs=-1, required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
)  # fmt: skip
@click.option(
    "--router", "routers", multiple=True, type=click.Choice(router_names()),
    help="Give it once for each; default: all. `exact` knows what no router can know.",
)  # fmt: skip
@click.option(
    "--workers", multiple=True, type=click.IntRange(1, MAX_WORKERS), default=(8,),
    show_default=True, help="Give it once for each size of cluster.",
)  # fmt: skip
@click.option(
    "--pool", "pools", multiple=True, type=click.FloatRange(0, 1), default=(0.0,),
    show_default=True,
    help="A pool all share, as a share of the trace's unique blocks; 0: none. Once for each.",
)  # fmt: skip
@click.option(
    "--capacity", type=click.FloatRange(0, min_open=True), default=0.2, show_default=True,
    help="All workers' caches together, likewise; above 1 where many hold the same.",
)  # fmt: skip
@click.option(
    "--policy", type=click.Choice(list(POLICIES)), default=DEFAULT_POLICY, show_default=True,
    help="Of every cache and the pool.",
)  # fmt: skip
@click.option(
    "--utilisation", type=_RATE, default=0.7, show_default=True,
    help="Workers are made so slow that --at is busy for this share of the time, without a pool.",
)  # fmt: skip
@click.option(
    "--at", type=click.Choice(router_names()), default="round_robin", show_default=True,
    help="The router that --utilisation speaks of.",
)  # fmt: skip
@click.option(
    "--slowdown", type=_RATE,
    help="How many times slower than --prefill-tokens-per-s, instead of --utilisation.",
)  # fmt: skip
@click.option(
    "--prefill-tokens-per-s", type=_RATE, default=25_000.0, show_default=True,
    help="Computing, at the start of a prompt; loading is slowed with it.",
)  # fmt: skip
@click.option(
    "--doubling-tokens", type=_RATE, default=30_500.0, show_default=True,
    help="Position at which attention makes a token cost twice as much.",
)  # fmt: skip
@click.option(
    "--pool-gb-per-s", type=_RATE, default=40.0, show_default=True,
    help="Pool to worker at 128 KiB a token; a GB is 1e9 bytes.",
)  # fmt: skip
@click.option(
    "--serial-loads", is_flag=True,
    help="Load from the pool when a prompt's turn comes, not while it waits.",
)  # fmt: skip
@click.option(
    "--decode-ms", type=_NOT_NEGATIVE, default=25.0, show_default=True, help="Per output token."
)
@click.option(
    "--report-ms", type=_RATE, default=250.0, show_default=True,
    help="Between two load reports of a worker, as ours hears them.",
)  # fmt: skip
@click.option(
    "--delay-ms", type=_NOT_NEGATIVE, default=2.0, show_default=True,
    help="Until a report or an event comes to ours.",
)  # fmt: skip
@click.option("--block-tokens", type=click.IntRange(1), help="Where lengths do not tell it.")
@click.option("--limit", type=click.IntRange(1), help="Replay the first N requests only.")
@click.option("--json", "as_json", is_flag=True, help="One object per line and nothing else.")
def route(
    traces: tuple[Path, ...],
    routers: tuple[str, ...],
    workers: tuple[int, ...],
    pools: tuple[float, ...],
    utilisation: float,
    at: str,
    slowdown: float | None,
    prefill_tokens_per_s: float,
    doubling_tokens: float,
    pool_gb_per_s: float,
    serial_loads: bool,
    capacity: float,
    policy: str,
    decode_ms: float,
    report_ms: float,
    delay_ms: float,
    block_tokens: int | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Replay traces through routers, in virtual time."""
    base = Setup(
        prices=Prices(
            prefill_tokens_per_s=prefill_tokens_per_s,
            doubling_tokens=doubling_tokens,
            pool_gb_per_s=pool_gb_per_s,
        ),
        capacity=capacity,
        policy=policy,
        overlapped=not serial_loads,
        decode_s=decode_ms / 1_000,
        report_ms=report_ms,
        delay_ms=delay_ms,
    )
    rows: list[Row] = []
    with steps_shown() as steps:
        for path in traces:
            trace = read_trace(path, block_tokens=block_tokens, limit=limit)
            for sized in (replace(base, workers=count) for count in dict.fromkeys(workers)):
                factor = slowdown or _slowdown(trace, sized, at, utilisation, steps)
                for pool in dict.fromkeys(pools):
                    here = replace(sized, factor=factor, pool=pool)
                    for name in dict.fromkeys(routers or router_names()):
                        result = _replayed(trace, here, name, steps)
                        rows.append(Row(trace.name, name, here.workers, pool, result))
                        if as_json:
                            click.echo(rows[-1].as_json())
    if not as_json:
        _print_tables(rows)


def _slowdown(trace: Trace, setup: Setup, name: str, utilisation: float, steps: Steps) -> float:
    """Return the factor at which workers under a router are busy for a share of the time.

    Plain routers decide the same whatever the rates are, so one replay tells; for others the rates
    of that replay are the ones their decisions belong to.
    """
    found = _replayed(trace, setup, name, steps).utilisation
    return utilisation / found if found else 1.0


def _replayed(trace: Trace, setup: Setup, name: str, steps: Steps) -> RouteResult:
    pool = f" pool {setup.pool:.0%}" if setup.pool else ""
    steps.begin(f"{trace.name} {name} x{setup.workers}{pool}", len(trace.requests))
    return replay_route(trace, setup, make_router(name), on_request=steps.step)


def _print_tables(rows: Sequence[Row]) -> None:
    """Print a table per trace, size and pool: hits, balance and seconds to the first token."""
    console = Console()
    for trace, workers, pool in dict.fromkeys((r.trace, r.workers, r.pool) for r in rows):
        shared = f", shared pool of {pool:.0%}" if pool else ""
        console.print(
            f"{trace}: {workers} workers{shared}: hits and busy time in %, "
            "busiest worker over mean, seconds to the first token",
            markup=False,
        )
        table = Table()
        table.add_column("router", no_wrap=True)
        for column in ("own", "pool", "balance", "busy", "mean", "p50", "p99"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            if (row.trace, row.workers, row.pool) != (trace, workers, pool):
                continue
            found = row.result
            table.add_row(
                row.router,
                f"{found.token_hit * 100:.1f}",
                f"{found.pool_hit * 100:.1f}",
                f"{found.imbalance:.2f}",
                f"{found.utilisation * 100:.0f}",
                *(f"{s:.2f}" for s in (found.ttft_mean_s, found.ttft_p50_s, found.ttft_p99_s)),
            )
        console.print(table)
