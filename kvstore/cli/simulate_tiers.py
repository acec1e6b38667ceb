"""`kvstore simulate tiers`: a cluster's memory hierarchy on traces."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kvstore.cli.progress import steps_shown
from kvstore.cli.values import BYTES, format_bytes
from kvstore.directory.policies import make_policy
from kvstore.simulate.formats import read_trace
from kvstore.simulate.hierarchy import Shape
from kvstore.simulate.plot import check_plot
from kvstore.simulate.plot_tiers import Bar, write_bars
from kvstore.simulate.policies import OPTIMUM, policy_names
from kvstore.simulate.prices import Prices
from kvstore.simulate.tiers import Fractions, TiersResult, replay_tiers

_ONLINE = [name for name in policy_names() if name != OPTIMUM]
_SHARE = click.FloatRange(0, 1)
_RATE = click.FloatRange(0, min_open=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One result; hits are shares of all prompt tokens, capacities blocks of one tier each."""

    trace: str
    policy: str
    shape: Shape
    result: TiersResult

    def as_json(self) -> str:
        """Return the row as one line."""
        shape, result = self.shape, self.result
        return json.dumps(
            {
                "trace": self.trace,
                "policy": self.policy,
                "nodes": shape.hosts,
                "workers": shape.workers,
                "capacity_blocks": {
                    "hbm": shape.hbm_blocks,
                    "dram": shape.dram_blocks,
                    "nvme": shape.nvme_blocks,
                    "pool": shape.pool_blocks,
                },
                "token_hit": round(result.token_hit, 6),
                "hit": {tier: round(share, 6) for tier, share in result.hit.items()},
                "declined": round(result.declined, 6),
                "compute_s": round(result.compute_s, 3),
                "load_s": round(result.load_s, 3),
                "saved_s": round(result.saved_s, 3),
                "moved_bytes": dict(result.moved_bytes),
                "seconds": round(result.seconds, 3),
            }
        )


@click.command(short_help="Hits by tier, seconds saved and bytes moved in a cluster.")
@click.argument(
    "traces", metavar="TRACE…", nargs=-1, required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
)  # fmt: skip
@click.option(
    "--policy", "policies", multiple=True, type=click.Choice(_ONLINE),
    help="Of every tier; give it once for each; default: all.",
)  # fmt: skip
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Hosts, alike.")
@click.option(
    "--workers", type=click.IntRange(1), default=1, show_default=True, help="HBMs per node."
)
@click.option(
    "--hbm", type=_SHARE, default=0.005, show_default=True,
    help="All HBMs together, as a share of the trace's unique blocks.",
)  # fmt: skip
@click.option("--dram", type=_SHARE, default=0.04, show_default=True, help="All DRAM, likewise.")
@click.option("--nvme", type=_SHARE, default=0.32, show_default=True, help="All NVMe; 0: none.")
@click.option(
    "--pool", type=_SHARE, default=0.0, show_default=True, help="One pool for all nodes; 0: none."
)
@click.option("--peers", is_flag=True, help="Nodes read each other's DRAM and NVMe.")
@click.option(
    "--bytes-per-token", type=BYTES, default="128KiB", show_default=True, help="Of KV, all layers."
)
@click.option(
    "--prefill-tokens-per-s",
    type=_RATE,
    default=25_000.0,
    show_default=True,
    help="Computing, at the start of a prompt.",
)
@click.option(
    "--dram-gb-per-s",
    type=_RATE,
    default=50.0,
    show_default=True,
    help="DRAM to HBM; a GB is 1e9 bytes.",
)
@click.option("--nvme-gb-per-s", type=_RATE, default=6.0, show_default=True, help="NVMe to DRAM.")
@click.option("--peer-gb-per-s", type=_RATE, default=10.0, show_default=True, help="Between nodes.")
@click.option("--pool-gb-per-s", type=_RATE, default=5.0, show_default=True, help="Pool to DRAM.")
@click.option("--block-tokens", type=click.IntRange(1), help="Where lengths do not tell it.")
@click.option("--limit", type=click.IntRange(1), help="Replay the first N requests only.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False),
    help="Draw hits by tier: FILE.html (self-contained) or FILE.png (extra `plot`).",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One object per line and nothing else.")
def tiers(
    traces: tuple[Path, ...],
    policies: tuple[str, ...],
    nodes: int,
    workers: int,
    hbm: float,
    dram: float,
    nvme: float,
    pool: float,
    peers: bool,
    block_tokens: int | None,
    limit: int | None,
    plot: Path | None,
    as_json: bool,
    **prices: float,
) -> None:
    """Replay traces through HBM, DRAM, NVMe, peers and a shared pool."""
    if plot is not None:
        check_plot(plot)
    fractions = Fractions(hbm=hbm, dram=dram, nvme=nvme, pool=pool)
    costs = Prices(**prices)  # type: ignore[arg-type]  # bytes per token come as an int
    rows: list[Row] = []
    with steps_shown() as steps:
        for path in traces:
            trace = read_trace(path, block_tokens=block_tokens, limit=limit)
            shape = fractions.shape(trace, hosts=nodes, workers=workers, peers=peers)
            for name in dict.fromkeys(policies or _ONLINE):
                steps.begin(f"{trace.name} {name}", len(trace.requests))
                make = partial(make_policy, name)
                result = replay_tiers(trace, shape, make, costs, on_request=steps.step)
                rows.append(Row(trace.name, name, shape, result))
                if as_json:
                    click.echo(rows[-1].as_json())
    if not as_json:
        _print_tables(rows)
    if plot is not None:
        write_bars(plot, [Bar(row.trace, row.policy, row.result.hit) for row in rows])


def _print_tables(rows: Sequence[Row]) -> None:
    """Print per trace: hits by tier in %, seconds, and what crossed between tiers."""
    console = Console()
    for trace in dict.fromkeys(row.trace for row in rows):
        mine = [row.result for row in rows if row.trace == trace]
        names = [row.policy for row in rows if row.trace == trace]
        console.print(f"{trace}: share of prompt tokens by tier in %, prefill", markup=False)
        hits = Table()
        for column in ("policy", *mine[0].hit, "all", "without cache", "saved"):
            hits.add_column(column, justify="left" if column == "policy" else "right")
        moved = Table()
        crossings = sorted({crossing for result in mine for crossing in result.moved_bytes})
        for column in ("policy", *crossings):
            moved.add_column(column, justify="left" if column == "policy" else "right")
        for name, result in zip(names, mine, strict=True):
            shares = (f"{share * 100:.1f}" for share in (*result.hit.values(), result.token_hit))
            hits.add_row(name, *shares, f"{result.compute_s:.0f} s", f"{result.saved_s:.0f} s")
            sizes = (result.moved_bytes.get(crossing, 0) for crossing in crossings)
            moved.add_row(name, *map(format_bytes, sizes))
        console.print(hits)
        console.print(moved)
