"""The command `kvstore bench kernels`; without our CLI: `python -m kvkernels.bench`."""

import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final

import click
import torch

from kvkernels.bench import latents, moving
from kvkernels.bench.cells import GATE, LAYERS, Batch, Cell, attend, expected, make, plan_of
from kvstore.core.errors import BadInput, Corrupt, Unsupported

TOLERANCE: Final = 5e-3
"""Relative error (norms) of bf16 outputs; rounding them alone makes 1.7e-3 of it."""
PEER_LIMIT_GB_S: Final = 3_126.0
"""Measured read limit of the H100 on which the peers' times were taken."""
PEER_LIMIT_TFLOP_S: Final = 700.0
"""What a large matrix product reached there."""
_BY_PRODUCTS: Final = 32
"""New tokens from which a case is bound by arithmetic, and counted in TFLOP/s."""
_CHECKED: Final = 2


@click.command(short_help="Measure attention and movement kernels on this machine's GPU.")
@click.option("--case", "pattern", default="*", metavar="GLOB", help="Only cases like this.")
@click.option("--quick", is_flag=True, help="Every third case.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per case.")
def kernels(pattern: str, quick: bool, as_json: bool) -> int:
    """Check each kernel against plain attention in float64, then time it.

    The value is GB/s of cells read, the limit what this GPU reads at all, measured in this run; of
    appends TFLOP/s, and what a large matrix product reaches. Peers are recorded times on an H100,
    scaled by the limits of the two runs. Exit status 1 when a
    result was wrong.
    """
    if not torch.cuda.is_available():
        raise Unsupported("no CUDA device here: kvstore bench kernels needs one")
    cells = [cell for cell in GATE if fnmatchcase(cell.name, pattern)]
    rows = [cell for cell in latents.GATE if fnmatchcase(cell.name, pattern)]
    moves = [cell for cell in moving.GATE if fnmatchcase(cell.name, pattern)]
    if not cells and not rows and not moves:
        raise BadInput(f"--case {pattern!r} is like no case")
    wrong = 0
    for name, run in (
        *_attention(cells[:: 3 if quick else 1], rows[:: 3 if quick else 1]),
        *_moves(moves[:: 3 if quick else 1]),
    ):
        try:
            row = run()
        except Corrupt as error:
            click.echo(f"{name}: {error}", err=True)
            wrong += 1
            continue
        click.echo(json.dumps(row) if as_json else _line(row))
    return 1 if wrong else 0


Run = Callable[[], dict[str, Any]]


def _attention(cells: Sequence[Cell], rows: Sequence[latents.LatentCell]) -> list[tuple[str, Run]]:
    """Return what measures each cell, of K and V and of latents, with this GPU's limits."""
    if not cells and not rows:
        return []
    from kvkernels.bench.timing import product_limit, read_limit

    limits = read_limit(), product_limit()
    say = f"{torch.cuda.get_device_name()}: reads {limits[0]:,.0f} GB/s, {limits[1]:,.0f} TFLOP/s"
    click.echo(say, err=True)
    return [
        *((cell.name, partial(measure, cell, *limits)) for cell in cells),
        *((cell.name, partial(latents.measure, cell, *limits)) for cell in rows),
    ]


def _moves(cells: Sequence[moving.Move]) -> list[tuple[str, Run]]:
    """Return what measures each movement, with the copy engine's rates."""
    if not cells:
        return []
    both = moving.memories()
    copies = {store: moving.copy_limit(both, store=store) for store in (False, True)}
    say = f"the copy engine loads {copies[False]:.1f} GB/s and stores {copies[True]:.1f}"
    click.echo(say, err=True)
    return [(cell.name, partial(moving.measure, cell, both, copies[cell.store])) for cell in cells]


def measure(cell: Cell, read: float, product: float) -> dict[str, Any]:
    """Return the row of one cell; raises `Corrupt` when the kernel is wrong.

    `read` and `product` are this GPU's limits, GB/s and TFLOP/s.
    """
    from kvkernels.bench.timing import REPLAYS, microseconds

    batch = make(cell, "cuda")
    plan = plan_of(batch)

    def launch(number: int) -> torch.Tensor:
        return attend(cell, batch, plan, number % LAYERS)

    check(cell, batch, launch(1))
    taken = microseconds(launch)
    by_products = cell.new >= _BY_PRODUCTS
    limit, theirs = (product, PEER_LIMIT_TFLOP_S) if by_products else (read, PEER_LIMIT_GB_S)
    done = cell.products / 1e3 if by_products else cell.read_bytes
    peer = None if cell.peer_us is None else cell.peer_us * theirs / limit
    return {
        "bench": "kernels",
        "case": cell.name,
        "value": round(done / taken / 1e3, 1),
        "unit": "TFLOP/s" if by_products else "GB/s",
        "limit": round(limit, 1),
        "limit_name": f"{'matrix product' if by_products else 'read limit'} of this run",
        "ratio_to_limit": round(done / taken / 1e3 / limit, 3),
        "peer": None if peer is None else round(done / peer / 1e3, 1),
        "peer_name": None if peer is None else f"{cell.peer}, recorded, scaled",
        "ratio_to_peer": None if peer is None else round(peer / taken, 3),
        "runs": REPLAYS,
        "microseconds": round(taken, 1),
        "device": torch.cuda.get_device_name(),
    }


def check(cell: Cell, batch: Batch, got: torch.Tensor) -> None:
    """Compare a few sequences of layer 1 with the oracle; raises `Corrupt` naming the error."""
    rows = sorted({0, cell.batch - 1})[:_CHECKED]
    want = expected(cell, batch, 1, rows)
    mine = torch.cat([got[row * cell.new : (row + 1) * cell.new] for row in rows])
    error = relative_error(mine, want)
    if not error < TOLERANCE:
        raise Corrupt(f"differs from plain attention by {error:.3g}")


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of `want`; NaN where either has one."""
    return float((got.double() - want).norm() / want.norm())


def _line(row: dict[str, Any]) -> str:
    peer = "" if row["peer"] is None else f"  {row['ratio_to_peer']:.2f} of {row['peer_name']}"
    return (
        f"{row['case']:32} {row['microseconds']:9.1f} us {row['value']:8.1f} {row['unit']:7}"
        f"  {row['ratio_to_limit']:.2f} of the limit{peer}"
    )
