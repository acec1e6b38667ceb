"""The command `kvstore bench worker`; without our CLI: `python -m kvworkers.bench`."""

import asyncio
import gc
import json
from collections.abc import Awaitable, Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import torch

from kvstore.core.heap import settle_heap
from kvstore.core.names import Fidelity
from kvstore.simulate.formats import read_trace
from kvworkers.bench.cases import Cases, lossy_case
from kvworkers.bench.replay import replay_trace
from kvworkers.bench.rig import rig
from kvworkers.models.random_weights import SHAPES, random_model

Replay = Callable[..., Awaitable[None]]

_LOSSY_GIB: Final = 6
"""Arena of a node whose blocks are kept smaller: a prompt of 32k tokens fits in well."""


@click.command(short_help="Measure the worker's engine with a real node beside it.")
@click.option("--case", "pattern", default="*", metavar="GLOB", help="Only cases like this.")
@click.option("--model", default="", help=f"One of {', '.join(SHAPES)}; default: by the device.")
@click.option("--layers", type=int, help="Cut the model's depth.")
@click.option("--runs", default=20, show_default=True, help="Runs of each case.")
@click.option("--quick", is_flag=True, help="Five runs of each case.")
@click.option("--scale", default=0, help="Divide lengths and batches; default: 1 on a GPU, 32.")
@click.option("--arena-gib", default=0, help="Arena of the node; default: 24 on a GPU, 1.")
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Replay conversations of this trace instead, with caches and without.",
)
@click.option("--requests", default=200, show_default=True, help="Of the trace.")
@click.option("--streams", default=4, show_default=True, help="Of its sessions at a time.")
@click.option("--block-tokens", default=0, help="A trace's block here; default: its own / --scale.")
@click.option("--seed", default=0, show_default=True, help="Of what is chosen and what it says.")
@click.option("--pages", default=0, help="At most so many pages; default: as memory allows.")
@click.option("--nvme", type=click.Path(file_okay=False), help="Where the node keeps blocks below.")
@click.option("--nvme-bytes", default=1 << 30, show_default=True, help="Bytes of --nvme.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per case.")
def worker(as_json: bool, quick: bool, **options: Any) -> int:
    """Serve a model of random weights and real shape, and time requests to it.

    Times to the first token are the worker's own, from arrival; an append's is that of its step,
    with `ttft_ms` beside it. A ratio to a limit or a peer
    is above 1 where ours is better.
    """
    options["runs"] = 5 if quick else options["runs"]
    wanted = {name: options.pop(name) for name in ("requests", "streams", "block_tokens", "seed")}
    if (trace := options.pop("trace")) is not None:
        options["replayed"] = partial(replay_trace, read_trace(trace), **wanted)
    asyncio.run(_measure(as_json, **options))
    return 0


async def _measure(
    as_json: bool,
    *,
    pattern: str,
    model: str,
    layers: int | None,
    runs: int,
    scale: int,
    arena_gib: int,
    pages: int,
    nvme: str | None,
    nvme_bytes: int,
    replayed: Replay | None = None,
) -> None:
    gpu = torch.cuda.is_available()
    name = model or ("llama-3.1-8b" if gpu else "smollm2-135m")
    about = torch.cuda.get_device_name() if gpu else "CPU"
    click.echo(f"{name} with random weights on {about}", err=True)
    loaded = await asyncio.to_thread(
        random_model, name, device="cuda" if gpu else "cpu", layers=layers
    )

    def emit(case: str, value: float, unit: str, **more: Any) -> None:
        row = _row(case, value, unit, about, name, **more)
        click.echo(json.dumps(row) if as_json else f"{case:32} {row['value']:12} {unit}")

    scale = scale or (1 if gpu else 32)
    how = _sizes(gpu, scale, pages=pages, nvme=nvme, nvme_bytes=nvme_bytes)

    async def over(arena: int, run: Callable[[Cases], Awaitable[None]] | None) -> None:
        # A function of its own: nothing of one rig may be held while the next takes its memory.
        async with rig(loaded, arena_bytes=(arena if gpu else 1) << 30, **how) as running:
            settle_heap()
            click.echo(f"{running.pool.pages} pages of {running.pool.block_bytes} bytes", err=True)
            if run is not None:
                await run(Cases(running, emit, pattern=pattern, runs=runs, scale=scale))
            elif replayed is not None:
                await replayed(running, emit, scale=scale)

    await over(arena_gib or 24, None if replayed else Cases.run)
    if replayed is not None:
        return
    for fidelity in (Fidelity.FP8, Fidelity.INT8, Fidelity.INT4):
        if fnmatchcase(lossy_case(fidelity), pattern):
            loaded.keep_as(fidelity)
            gc.unfreeze()  # An engine is in cycles, and with it the memory of its pages.
            gc.collect()
            await over(_LOSSY_GIB, partial(Cases.run_kept_as, fidelity=fidelity))


def _sizes(
    gpu: bool, scale: int, *, pages: int, nvme: str | None, nvme_bytes: int
) -> dict[str, Any]:
    """Return what a rig is made with, beside its arena."""
    return {
        "step_tokens": 4_096 // scale if gpu else 512,
        "batch": 64 if gpu else 16,
        "max_pages": pages,
        "node_options": ("--nvme", nvme, "--nvme-bytes", str(nvme_bytes)) if nvme else (),
    }


def _row(
    case: str,
    value: float,
    unit: str,
    device: str,
    model: str,
    *,
    limit: float | None = None,
    limit_name: str | None = None,
    peer: float | None = None,
    peer_name: str | None = None,
    runs: int | None = None,
    load_ms: float | None = None,
    ttft_ms: float | None = None,
) -> dict[str, Any]:
    """Return a row as DESIGN §8 has it; a time is better when smaller."""

    def ratio(other: float | None) -> float | None:
        if other is None or value <= 0:
            return None
        return round(other / value if unit == "ms" else value / other, 3)

    return {
        "bench": "worker",
        "case": case,
        "value": round(value, 3),
        "unit": unit,
        "limit": None if limit is None else round(limit, 3),
        "limit_name": limit_name,
        "ratio_to_limit": ratio(limit),
        "peer": None if peer is None else round(peer, 3),
        "peer_name": peer_name,
        "ratio_to_peer": ratio(peer),
        "runs": runs,
        "device": device,
        "model": model,
        "load_ms": None if load_ms is None else round(load_ms, 3),
        "ttft_ms": None if ttft_ms is None else round(ttft_ms, 3),
    }
