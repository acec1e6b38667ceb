"""What the connector costs a real vLLM on CPU when nothing is ever found.

    python benchmarks/vllm_miss.py --vllm-python .venv-vllm/bin/python [--pairs 21]

One engine over a real node. Its connector is taken out and put back between batches, in scheduler
and worker: without it the engine is what it is where none was configured (two engines beside each
other differed by 40 % with no connector in either: memory and cores fall to processes by luck). A
pair is several turns: the same number of new prompts with and without, the other first in the next
turn. Every lookup misses, because no prompt comes twice. Cases: `control` (without, twice: what
the machine's noise makes of nothing), `lookup` (kv_role kv_consumer: asked, nothing stored) and
`lookup_store` (kv_both: what was computed is stored too).

The engine's threads are bound to one core (`--core`), as its own binding would leave the other to
the connector. The engine computes on the cores that store, so `lookup_store` has the copies' work
in its ratio; beside a GPU they run on cores that are idle.

One JSON line per figure on standard output: the median ratio of throughputs with a bootstrapped
95 % interval, that of CPU seconds, and the scheduler thread's microseconds.
"""

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import psutil
from kvworkers.models.provision import ensure_model

from kvstore.testing.node import start_node
from tests.engines.vllm_engine import Engine

THROUGHPUT_BAR: Final = 0.99
STEP_BAR: Final = 0.01
"""The scheduler's thread may add less than 1 % of a step."""
ROLES: Final = {"control": "kv_consumer", "lookup": "kv_consumer", "lookup_store": "kv_both"}
RESAMPLES: Final = 10_000


class Spent(NamedTuple):
    """What a batch took, of time and of all the engine's processes' CPU time."""

    wall_s: float
    cpu_s: float


def cpu_seconds(engine: Engine) -> float:
    """Return the CPU time of an engine's processes since they started."""
    process = psutil.Process(engine.pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


def interval(ratios: Sequence[float], dice: random.Random) -> tuple[float, float]:
    """Return the 95 % interval of the median, by the percentile bootstrap."""
    medians = sorted(
        statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def run_once(engine: Engine, prompts: list[list[int]], reply: int, *, on: bool) -> Spent:
    """Return what a batch took with the connector in or out."""
    if engine.ask(connector=on)["connector"] is not on:
        raise click.ClickException("the connector was not switched")
    cpu = cpu_seconds(engine)
    replies = engine.replies(prompts, reply, together=True)
    return Spent(replies[0]["s"], cpu_seconds(engine) - cpu)


def counted(engine: Engine) -> dict[str, float]:
    """Return the connector's counters."""
    found: dict[str, float] = engine.ask(metrics=True)["metrics"]
    return found


def measure(
    engine: Engine, *, asks: bool, pairs: int, turns: int, prompts: int, tokens: int, reply: int
) -> dict[str, Any]:
    """Run the pairs; return what they took and the connector's counts over all of them."""
    dice = random.Random(11)
    spent: dict[str, list[Spent]] = {"alone": [], "ours": []}
    before: dict[str, float] = {}
    for at in range(pairs + 1):
        sums = {"alone": Spent(0.0, 0.0), "ours": Spent(0.0, 0.0)}
        for turn in range(turns):
            for name in ("alone", "ours") if turn % 2 else ("ours", "alone"):
                batch = [
                    [dice.randrange(1000, 40000) for _ in range(tokens)] for _ in range(prompts)
                ]
                one = run_once(engine, batch, reply, on=asks and name == "ours")
                sums[name] = Spent(sums[name].wall_s + one.wall_s, sums[name].cpu_s + one.cpu_s)
        if at:  # the first pair warms up
            for name, sum_of in sums.items():
                spent[name].append(sum_of)
        else:
            before = counted(engine)
        click.echo(f"pair {at} of {pairs}", err=True)
    after = counted(engine)
    return {**spent, "counts": {name: after[name] - before.get(name, 0.0) for name in after}}


def rows(case: str, found: dict[str, Any], shape: dict[str, int]) -> list[dict[str, Any]]:
    """Return the figures of one case."""
    alone, ours, counts = found["alone"], found["ours"], found["counts"]
    wall = [plain.wall_s / with_us.wall_s for plain, with_us in zip(alone, ours, strict=True)]
    cpu = [with_us.cpu_s / plain.cpu_s for plain, with_us in zip(alone, ours, strict=True)]
    dice = random.Random(3)
    base = {"bench": "vllm_miss", "pairs": len(wall), **shape}

    def row(figure: str, value: float, unit: str, **more: Any) -> dict[str, Any]:
        return {**base, "case": f"{case}_{figure}", "value": round(value, 5), "unit": unit, **more}

    ratios = [
        row("throughput", statistics.median(wall), "ratio to vLLM alone", limit=THROUGHPUT_BAR,
            interval_95=[round(edge, 4) for edge in interval(wall, dice)]),
        row("cpu", statistics.median(cpu), "ratio of CPU seconds to vLLM alone",
            interval_95=[round(edge, 4) for edge in interval(cpu, dice)]),
    ]  # fmt: skip
    if case == "control":
        return ratios
    scheduler_us = counts["kvstore_vllm_scheduler_seconds_total"] * 1e6
    steps, requests = counts["kvstore_vllm_steps_total"], counts["kvstore_vllm_requests_total"]
    step_us = sum(one.wall_s for one in ours) * 1e6 / steps
    if counts.get("kvstore_vllm_lookup_hit_tokens_total"):
        raise click.ClickException("a lookup was a hit: nothing is measured")
    return [
        *ratios,
        row("scheduler_per_request", scheduler_us / requests, "us", requests=int(requests)),
        row("scheduler_per_step", scheduler_us / steps, "us", steps=int(steps)),
        row("scheduler_share", scheduler_us / steps / step_us, "of a step", limit=STEP_BAR,
            step_us=round(step_us, 1)),
        row("lookups", counts["kvstore_vllm_lookups_total"], "answered, all misses",
            stored_blocks=int(counts.get("kvstore_vllm_stored_blocks_total", 0))),
    ]  # fmt: skip


@click.command()
@click.option("--vllm-python", required=True, help="Interpreter of an environment with vLLM.")
@click.option("--pairs", default=21, show_default=True, type=click.IntRange(min=3))
@click.option("--turns", default=8, show_default=True, help="With and without, in a pair.")
@click.option("--prompts", default=2, show_default=True, help="Requests of a batch.")
@click.option("--tokens", default=96, show_default=True, help="Tokens of a prompt.")
@click.option("--reply", default=6, show_default=True, help="Tokens of an answer.")
@click.option("--core", default="0", show_default=True, help="Core of the engine's threads.")
@click.option("--case", "cases", multiple=True, type=click.Choice(list(ROLES)))
def main(
    vllm_python: str,
    pairs: int,
    turns: int,
    prompts: int,
    tokens: int,
    reply: int,
    core: str,
    cases: Any,
) -> None:
    """Measure the cost of misses."""
    model = ensure_model()
    shape = {"turns": turns, "prompts": prompts, "tokens": tokens, "reply": reply}
    logs = Path(tempfile.mkdtemp(prefix="vllm-miss-"))
    more = {"VLLM_CPU_OMP_THREADS_BIND": core, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    for case in cases or ROLES:
        with start_node(arena_bytes=256 << 20) as node:
            engine = Engine(vllm_python, model, logs / case, node.run_dir, ROLES[case], more)
            try:
                found = measure(engine, asks=case != "control", pairs=pairs, **shape)
            finally:
                engine.close()
        for row in rows(case, found, shape):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
