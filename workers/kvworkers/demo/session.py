"""The process behind `kvstore demo`: a cluster, conversations, measurements, the check, the end.

Run by the supervisor as `python -m kvworkers.demo.session CONFIG … --ready-fd N`.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.launch import RunningCluster
from kvworkers.cluster.progress import start_progress
from kvworkers.cluster.session import prepare_model, serving_cluster, session_process
from kvworkers.demo.check import PlainModel, Verdict, judge_all
from kvworkers.demo.report import Outcome, live_line, print_tables, row, summary
from kvworkers.demo.script import conversations
from kvworkers.demo.talk import Exchange, Frontend, Pair, Talk, measure_pairs

REPLY_TOKENS: Final = 32
"""Short replies: the demonstration is about prompts, and two cores decode some ten a second."""

_PAIRS: Final = 4


class Demonstration:
    """One run, told as it goes: live lines to standard error or, for `--json`, rows to output."""

    def __init__(self, *, clients: int, turns: int, as_json: bool) -> None:
        self._parts = conversations(clients, turns)
        self._as_json = as_json
        self._console = Console(stderr=as_json, highlight=False)
        self._begun = time.monotonic()

    def run(self, config: ClusterConfig, model: str | None) -> bool:
        """Run it all; return whether every reply was equal."""
        with ExitStack() as stack:
            with start_progress() as progress:
                config = config.with_model(prepare_model(model, progress))
                cluster = stack.enter_context(serving_cluster(config, progress))
            exchanges, pairs = asyncio.run(self._talk(cluster))
        verdicts = self._check(config, exchanges)
        outcome = Outcome(
            exchanges=exchanges,
            pairs=pairs,
            verdicts=verdicts,
            seconds=time.monotonic() - self._begun,
        )
        self._print(outcome)
        return outcome.passed

    async def _talk(self, cluster: RunningCluster) -> tuple[list[Exchange], list[Pair]]:
        endpoints = cluster.endpoints()
        clients, turns = len(self._parts), len(self._parts[0].questions)
        self._say(f"\n[bold]{clients} clients, {turns} turns each[/], {endpoints.grpc}")
        async with Frontend(endpoints.grpc) as frontend:
            talk = Talk(frontend, max_tokens=REPLY_TOKENS, heard=self._heard)
            await talk.hold(self._parts)
            self._say("\n[bold]The same prompts again, with the cache and without[/]")
            pairs = await measure_pairs(
                frontend, talk.exchanges, limit=_PAIRS, measured=self._measured
            )
        return talk.exchanges, pairs

    def _heard(self, exchange: Exchange) -> None:
        if self._as_json:
            self._line(row(exchange))
        self._say(live_line(exchange))

    def _measured(self, pair: Pair) -> None:
        self._say(
            f"  {pair.prompt_tokens} tokens: [green]{pair.hit_ms:.0f} ms[/] with "
            f"{pair.hit_tokens} cached, {pair.cold_ms:.0f} ms without"
        )

    def _check(self, config: ClusterConfig, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Hold the replies against the plain model, in this process, the cluster being gone."""
        columns = (
            TextColumn("  the plain model in transformers"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._say("\n[bold]Checking every reply against the uncached model[/]")
        console = Console(stderr=True, highlight=False)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(exchanges))
            model = PlainModel(config.model, threads=os.cpu_count() or 1)
            return judge_all(model, exchanges, judged=lambda n: progress.advance(task, n))

    def _print(self, outcome: Outcome) -> None:
        self._console.print()
        print_tables(self._console, outcome)
        if self._as_json:
            self._line(summary(outcome))

    def _say(self, words: str) -> None:
        self._console.print(words, no_wrap=True, overflow="ellipsis", crop=True)

    def _line(self, facts: dict[str, object]) -> None:
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the demonstration's process; exit status 0 only if all replies were equal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--model", default=None)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--turns", type=int, required=True)
    parser.add_argument("--json", dest="as_json", action="store_true")
    parser.add_argument("--ready-fd", type=int, required=True)
    given = parser.parse_args(arguments)
    with session_process():
        demonstration = Demonstration(
            clients=given.clients, turns=given.turns, as_json=given.as_json
        )
        passed = demonstration.run(ClusterConfig.from_json(given.config), given.model)
        sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
