"""What the connector costs a real vLLM on CPU when nothing is ever found.

    python benchmarks/vllm_miss.py --vllm-python .venv-vllm/bin/python [--pairs 21]

Two engines run beside each other: vLLM alone, and vLLM with our connector over a real node. Each
pair is several turns: both get the same new prompts, one engine after the other, the other first
in the next turn, so that what else the machine does falls on both; the one that is not asked
rests. Every lookup misses, because no prompt comes twice. Cases: `control` (two
engines without a connector: what the machine's noise makes of nothing), `lookup` (kv_role
kv_consumer: asked, nothing stored) and `lookup_store` (kv_both: what was computed is stored too).

vLLM on a CPU binds its threads otherwise with a connector than without one (it reserves cores),
so both are bound to one core here (`--core`): else the binding is what is measured. The engine
computes on the cores that store, so `lookup_store` has the copies' work in its ratio; beside a
GPU they run on cores that are idle. The answers of both engines are compared.

One JSON line per figure on standard output: the median ratio of throughputs with a bootstrapped
95 % interval, that of CPU seconds, and the scheduler thread's microseconds.
"""

import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
import psutil
from kvworkers.models.provision import ensure_model

from kvstore.testing.node import start_node
from tests.engines.vllm_engine import Engine

THROUGHPUT_BAR: Final = 0.99
STEP_BAR: Final = 0.01
"""The scheduler's thread may add less than 1 % of a step."""
ROLES: Final = {"control": "-", "lookup": "kv_consumer", "lookup_store": "kv_both"}
RESAMPLES: Final = 10_000


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


def run_once(engine: Engine, prompts: list[list[int]], reply: int) -> tuple[float, float, Any]:
    """Return the seconds of a batch, its CPU seconds and the tokens of its answers."""
    cpu = cpu_seconds(engine)
    replies = engine.replies(prompts, reply, together=True)
    return replies[0]["s"], cpu_seconds(engine) - cpu, [one["tokens"] for one in replies]


def counted(engine: Engine) -> dict[str, float]:
    """Return the connector's counters."""
    found: dict[str, float] = engine.ask(metrics=True)["metrics"]
    return found


def measure(
    alone: Engine, ours: Engine, *, pairs: int, turns: int, prompts: int, tokens: int, reply: int
) -> dict[str, Any]:
    """Run the pairs; return seconds, CPU seconds and the connector's counts over all of them."""
    dice = random.Random(11)
    spent: dict[str, list[tuple[float, float]]] = {"alone": [], "ours": []}
    engines = {"alone": alone, "ours": ours}
    before: dict[str, float] = {}
    for at in range(pairs + 1):
        sums = {"alone": (0.0, 0.0), "ours": (0.0, 0.0)}
        for turn in range(turns):
            batch = [[dice.randrange(1000, 40000) for _ in range(tokens)] for _ in range(prompts)]
            answers = {}
            for name in ("alone", "ours") if turn % 2 else ("ours", "alone"):
                seconds, cpu, answers[name] = run_once(engines[name], batch, reply)
                sums[name] = sums[name][0] + seconds, sums[name][1] + cpu
            if answers["alone"] != answers["ours"]:
                raise click.ClickException("the two engines answer differently")
        if at:  # the first pair warms both up
            for name, sum_of in sums.items():
                spent[name].append(sum_of)
        if not at:
            before = counted(ours)
        click.echo(f"pair {at} of {pairs}", err=True)
    after = counted(ours)
    return {**spent, "counts": {name: after[name] - before.get(name, 0.0) for name in after}}


def rows(case: str, found: dict[str, Any], shape: dict[str, int]) -> list[dict[str, Any]]:
    """Return the figures of one case."""
    alone, ours, counts = found["alone"], found["ours"], found["counts"]
    wall = [plain[0] / with_us[0] for plain, with_us in zip(alone, ours, strict=True)]
    cpu = [with_us[1] / plain[1] for plain, with_us in zip(alone, ours, strict=True)]
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
    step_us = sum(seconds for seconds, _ in ours) * 1e6 / steps
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
@click.option("--turns", default=8, show_default=True, help="Of both engines in a pair.")
@click.option("--prompts", default=2, show_default=True, help="Requests of a batch.")
@click.option("--tokens", default=96, show_default=True, help="Tokens of a prompt.")
@click.option("--reply", default=6, show_default=True, help="Tokens of an answer.")
@click.option("--core", default="0", show_default=True, help="Core of both engines' threads.")
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
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = core
    model = ensure_model()
    shape = {"turns": turns, "prompts": prompts, "tokens": tokens, "reply": reply}
    logs = Path(tempfile.mkdtemp(prefix="vllm-miss-"))
    alone = Engine(vllm_python, model, logs / "alone")
    try:
        for case in cases or ROLES:
            with start_node(arena_bytes=256 << 20) as node:
                where = None if case == "control" else node.run_dir
                ours = Engine(vllm_python, model, logs / case, where, ROLES[case])
                try:
                    found = measure(alone, ours, pairs=pairs, **shape)
                finally:
                    ours.close()
            for row in rows(case, found, shape):
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()
    finally:
        alone.close()


if __name__ == "__main__":
    main()
