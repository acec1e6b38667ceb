"""`kvstore simulate evict`: hit rates of policies on traces, with the optimum beside them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from kvstore.cli.progress import Steps, steps_shown
from kvstore.simulate.formats import read_trace
from kvstore.simulate.plot import Curve, Point, check_plot, write_plot
from kvstore.simulate.policies import policy_names, replay_named
from kvstore.simulate.replay import ReplayResult
from kvstore.simulate.trace import Trace

FRACTIONS: Final = (0.001, 0.01, 0.05, 0.1, 0.25)


@dataclass(frozen=True, slots=True)
class Row:
    """One result, as DESIGN names its fields; hit rates are shares, 0 to 1."""

    trace: str
    fraction: float
    result: ReplayResult

    def as_json(self) -> str:
        """Return the row as one line."""
        result = self.result
        return json.dumps(
            {
                "trace": self.trace,
                "policy": result.policy,
                "fraction": self.fraction,
                "capacity_blocks": result.capacity_blocks,
                "token_hit": round(result.token_hit, 6),
                "block_hit": round(result.block_hit, 6),
                "writes_per_request": round(result.writes_per_request, 3),
                "seconds": round(result.seconds, 3),
            }
        )


@click.command(short_help="Hit rates of eviction policies, and the optimum's.")
@click.argument(
    "traces", metavar="TRACE…", nargs=-1, required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
)  # fmt: skip
@click.option(
    "--policy", "policies", multiple=True, type=click.Choice(policy_names()),
    help="Give it once for each; default: all.",
)  # fmt: skip
@click.option(
    "--fraction", "fractions", multiple=True, type=click.FloatRange(0, 1, min_open=True),
    help=f"Capacity as a share of the trace's unique blocks.  [default: {FRACTIONS}]",
)  # fmt: skip
@click.option("--block-tokens", type=click.IntRange(1), help="Where lengths do not tell it.")
@click.option("--limit", type=click.IntRange(1), help="Replay the first N requests only.")
@click.option(
    "--no-hints", is_flag=True,
    help="Keep the requests' types from the policies, as engines do that do not know them.",
)  # fmt: skip
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False),
    help="Draw hit rate against capacity: FILE.html (self-contained) or FILE.png (extra `plot`).",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One object per line and nothing else.")
def evict(
    traces: tuple[Path, ...],
    policies: tuple[str, ...],
    fractions: tuple[float, ...],
    block_tokens: int | None,
    limit: int | None,
    no_hints: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Replay traces through eviction policies at several capacities."""
    if plot is not None:
        check_plot(plot)
    rows: list[Row] = []
    with steps_shown() as steps:
        for path in traces:
            trace = read_trace(path, block_tokens=block_tokens, limit=limit)
            for name in dict.fromkeys(policies or policy_names()):
                for fraction in fractions or FRACTIONS:
                    row = _replayed(trace, name, fraction, steps, hints=not no_hints)
                    rows.append(row)
                    if as_json:
                        click.echo(row.as_json())
    if not as_json:
        _print_tables(rows)
    if plot is not None:
        write_plot(plot, _curves(rows))


def _replayed(trace: Trace, name: str, fraction: float, steps: Steps, *, hints: bool) -> Row:
    capacity = trace.capacity(fraction)
    steps.begin(f"{trace.name} {name} {fraction:.1%}", len(trace.requests))
    result = replay_named(trace, name, capacity, hints=hints, on_request=steps.step)
    return Row(trace.name, fraction, result)


def _curves(rows: Sequence[Row]) -> list[Curve]:
    curves: dict[tuple[str, str], list[Point]] = {}
    for row in rows:
        points = curves.setdefault((row.trace, row.result.policy), [])
        points.append(Point(row.fraction, row.result.token_hit))
    return [
        Curve(trace, policy, sorted(points)) for (trace, policy), points in sorted(curves.items())
    ]


def _print_tables(rows: Sequence[Row]) -> None:
    """Print a table per trace: policies down, capacities across, token hit rate in %."""
    console = Console()
    for trace in dict.fromkeys(row.trace for row in rows):
        mine = [row for row in rows if row.trace == trace]
        columns = list(dict.fromkeys(row.fraction for row in mine))
        console.print(f"{trace}: token hit rate in % (blocks written per request)", markup=False)
        table = Table()
        table.add_column("policy")
        for fraction in columns:
            table.add_column(f"{fraction * 100:g} %", justify="right")
        for policy in dict.fromkeys(row.result.policy for row in mine):
            cells = {
                row.fraction: f"{row.result.token_hit * 100:.1f} "
                f"({row.result.writes_per_request:.1f})"
                for row in mine
                if row.result.policy == policy
            }
            table.add_row(policy, *(cells[fraction] for fraction in columns))
        console.print(table)
