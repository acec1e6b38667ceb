"""What the connector costs a real vLLM on CPU when nothing is ever found.

    python benchmarks/vllm_miss.py --vllm-python .venv-vllm/bin/python    # about 10 minutes

One engine over a real node; its connector is exchanged between batches, in scheduler and worker,
because two engines beside each other differ by 40 % without any connector (memory and cores fall
to processes by luck). A round is one batch of new prompts for each arm, in an order drawn anew:

    off, control   no connector, as where none was configured; twice, what noise makes of nothing
    null           a connector that does nothing: vLLM's own way round one, a floor for all
    ask            ours, asked and nothing stored (kv_role kv_consumer)
    store          ours, what was computed is stored too (kv_both)

Every lookup misses, because no prompt comes twice. Clients send their next request when one is
answered, answers differ in length, so requests arrive in an engine that is computing, too. A batch
ends when all is stored. Workloads: `short` two requests of 64 tokens, 4 out, at once; `chat` 512
tokens, 8 to 24 out, two clients; `arrivals` 64 tokens, 8 to 24 out, three clients.

Engine and node share the machine, so a store's copies and the node's work are in the ratios; beside
a GPU they run on cores that are idle. `--threads` bounds the engine's OpenMP threads.

One JSON line per figure on standard output: medians with bootstrapped 95 % intervals of the ratios
(throughput, CPU seconds of the engine's process) to the mean of the round's `off` and `control`;
steps a batch, which no noise changes; CPU milliseconds a request by whose threads they are.
"""

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
from kvworkers.models.provision import ensure_model

from kvstore.testing.node import RunningNode, start_node
from tests.engines.vllm_engine import Engine

THROUGHPUT_BAR: Final = 0.99
STEP_BAR: Final = 0.01
"""The scheduler's thread may add less than 1 % of a step."""
RUNS: Final = {"off": "off", "control": "off", "null": "null", "ask": "ask", "store": "store"}
RESAMPLES: Final = 10_000


class Workload(NamedTuple):
    """The requests of one batch; answers have `least` to `most` tokens."""

    requests: int
    clients: int
    tokens: int
    least: int
    most: int
    batches: int
    """In a round, for each arm: short ones are summed."""


WORKLOADS: Final = {
    "short": Workload(2, 2, 64, 4, 4, 3),
    "chat": Workload(4, 2, 512, 8, 24, 1),
    "arrivals": Workload(9, 3, 64, 8, 24, 1),
}


class Spent(NamedTuple):
    """What the batches of one arm in one round took."""

    wall_s: float
    cpu_s: dict[str, float]
    """Of the engine's process by kind of thread, and of the node's processes."""
    steps: dict[str, int]
    counts: dict[str, float]


def node_seconds(pids: Sequence[int]) -> float:
    """Return the CPU time of the node's processes since they started."""
    tasks = (task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir())
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def interval(ratios: Sequence[float], dice: random.Random) -> list[float]:
    """Return the 95 % interval of the median, by the percentile bootstrap."""
    medians = sorted(
        statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    return [round(medians[int(edge * RESAMPLES)], 4) for edge in (0.025, 0.975)]


def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the sums by key."""
    return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}


def run_once(
    engine: Engine, pids: Sequence[int], arm: str, prompts: list[list[int]], replies: list[int],
    clients: int,
) -> Spent:  # fmt: skip
    """Return what one batch took under one arm."""
    if engine.ask(arm=arm)["arm"] != arm:
        raise click.ClickException(f"the engine did not take {arm}")
    before, node = counted(engine), node_seconds(pids)
    took = engine.ask(loop=prompts, replies=replies, clients=clients)
    node = node_seconds(pids) - node
    after = counted(engine)
    counts = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return Spent(took["s"], {**took["cpu_s"], "node": node}, took["steps"], counts)


def counted(engine: Engine) -> dict[str, float]:
    """Return the connector's counters."""
    found: dict[str, float] = engine.ask(metrics=True)["metrics"]
    return found


def measure(engine: Engine, node: RunningNode, case: str, rounds: int) -> dict[str, list[Spent]]:
    """Run the rounds; return what each took by arm. The first warms up and is left out."""
    # Each case has dice of its own: from the same ones a prompt may go on like another's.
    work, dice = WORKLOADS[case], random.Random(case)
    pids = (node.keeper_pid, node.node_pid)
    spent: dict[str, list[Spent]] = {run: [] for run in RUNS}
    for at in range(rounds + 1):
        sums = {run: Spent(0.0, {}, {}, {}) for run in RUNS}
        for _ in range(work.batches):
            replies = [dice.randint(work.least, work.most) for _ in range(work.requests)]
            for run in dice.sample(list(RUNS), len(RUNS)):
                prompts = [
                    [dice.randrange(1000, 40000) for _ in range(work.tokens)] for _ in replies
                ]
                one = run_once(engine, pids, RUNS[run], prompts, replies, work.clients)
                was = sums[run]
                sums[run] = Spent(
                    was.wall_s + one.wall_s,
                    added(was.cpu_s, one.cpu_s),
                    added(was.steps, one.steps),
                    added(was.counts, one.counts),
                )
        if at:
            for run, total in sums.items():
                spent[run].append(total)
        click.echo(f"round {at} of {rounds}", err=True)
    return spent


def engine_cpu(spent: Spent) -> float:
    """Return the CPU seconds of the engine's process, all its threads."""
    return sum(value for kind, value in spent.cpu_s.items() if kind != "node")


def rows(case: str, spent: dict[str, list[Spent]], work: Workload, base: dict[str, Any]) -> Any:
    """Yield the figures of one workload."""
    dice = random.Random(3)
    requests = work.requests * work.batches

    def ratios(run: str, of: Callable[[Spent], float]) -> list[float]:
        pairs = zip(spent["off"], spent["control"], spent[run], strict=True)
        if run == "control":
            return [of(other) / of(off) for off, other, _ in pairs]
        return [of(one) / ((of(off) + of(other)) / 2) for off, other, one in pairs]

    def row(run: str, figure: str, value: float, unit: str, **more: Any) -> dict[str, Any]:
        name = f"{case}_{run}_{figure}"
        return {**base, "case": name, "value": round(value, 5), "unit": unit, **more}

    for run in RUNS:
        if run != "off":
            wall = [1 / ratio for ratio in ratios(run, lambda one: one.wall_s)]
            limit = {"limit": THROUGHPUT_BAR} if run in ("ask", "store") else {}
            yield row(
                run, "throughput", statistics.median(wall), "ratio to vLLM alone",
                interval_95=interval(wall, dice), **limit,
            )  # fmt: skip
            cpu = ratios(run, engine_cpu)
            yield row(
                run, "cpu", statistics.median(cpu), "ratio of CPU seconds to vLLM alone",
                interval_95=interval(cpu, dice),
            )  # fmt: skip
        computed, empty = (
            statistics.mean(one.steps.get(kind, 0) for one in spent[run])
            for kind in ("computed", "empty")
        )
        yield row(run, "steps", computed, "steps a round that compute", empty=round(empty, 2))
        kinds = sorted({kind for one in spent[run] for kind in one.cpu_s})
        by_kind = {
            kind: statistics.median(one.cpu_s.get(kind, 0.0) for one in spent[run])
            for kind in kinds
        }
        shown = {kind: round(seconds * 1e3 / requests, 3) for kind, seconds in by_kind.items()}
        whole = statistics.median(engine_cpu(one) for one in spent[run]) * 1e3 / requests
        yield row(
            run, "cpu_ms", whole, "CPU ms a request, of the engine's process", by_thread=shown
        )
        if run in ("ask", "store"):
            yield scheduler_row(run, spent[run], row)


def scheduler_row(run: str, spent: list[Spent], row: Callable[..., Any]) -> dict[str, Any]:
    """Return the share of a step that the connector took of the scheduler's thread.

    Waits for answers are apart and in the sum: there the thread computes nothing, and is late.
    """
    counts: dict[str, float] = {}
    for one in spent:
        counts = added(counts, one.counts)
    if counts.get("kvstore_vllm_lookup_hit_tokens_total"):
        raise click.ClickException("a lookup was a hit: nothing is measured")
    inside = counts["kvstore_vllm_scheduler_seconds_total"]
    waited = counts.get("kvstore_vllm_waited_seconds_total", 0.0)
    wall = sum(one.wall_s for one in spent)
    steps, requests = counts["kvstore_vllm_steps_total"], counts["kvstore_vllm_requests_total"]
    made: dict[str, Any] = row(
        run, "scheduler_share", inside / wall, "of a step", limit=STEP_BAR,
        us_a_step=round(inside * 1e6 / steps, 1), us_a_request=round(inside * 1e6 / requests, 1),
        waited_share=round(waited / wall, 5), waited_us_a_request=round(waited * 1e6 / requests, 1),
        with_waits=round((inside + waited) / wall, 5),
        requests=int(requests), lookups=int(counts["kvstore_vllm_lookups_total"]),
        stored_blocks=int(counts.get("kvstore_vllm_stored_blocks_total", 0)),
    )  # fmt: skip
    return made


@click.command()
@click.option("--vllm-python", required=True, help="Interpreter of an environment with vLLM.")
@click.option("--rounds", default=17, show_default=True, type=click.IntRange(min=3))
@click.option("--threads", default=0, help="OpenMP threads of the engine; 0: as vLLM chooses.")
@click.option("--workload", "workloads", multiple=True, type=click.Choice(list(WORKLOADS)))
def main(vllm_python: str, rounds: int, threads: int, workloads: Any) -> None:
    """Measure the cost of misses."""
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if threads:
        more["OMP_NUM_THREADS"] = str(threads)
    model, log = ensure_model(), Path(tempfile.mkdtemp(prefix="vllm-miss-")) / "log"
    with start_node(arena_bytes=256 << 20) as node:
        engine = Engine(vllm_python, model, log, node.run_dir, "kv_both", more)
        try:
            for case in workloads or WORKLOADS:
                work = WORKLOADS[case]
                spent = measure(engine, node, case, rounds)
                base = {"bench": "vllm_miss", "rounds": rounds, "threads": threads,
                        **work._asdict()}  # fmt: skip
                for row in rows(case, spent, work, base):
                    sys.stdout.write(json.dumps(row) + "\n")
                    sys.stdout.flush()
        finally:
            engine.close()


if __name__ == "__main__":
    main()
