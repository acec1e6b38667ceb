"""The real model in three ranks (SmolLM2 has three KV heads), beside a worker that is whole.

Both ways through one node: what either has computed, the other finds, and the plain model's tokens
come out. Then ranks die and hang, as processes and as actors (`kvworkers.cluster.rank_actors`).
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from kvworkers.models.provision import ensure_model

from kvstore.rpc.errors import error_from
from kvstore.testing.node import RunningNode, start_node
from tests.cluster_process import cluster_process, eventually
from tests.exactness import Exactness
from tests.inference_client import generate
from tests.worker_process import Answer, RunningWorker, ask, cached_tokens, start_worker

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

REPLY = 12
TEXTS = (
    "The lighthouse keeper wrote down the weather every evening, and what the ships had said. ",
    "Die Brücke über den Fluß wurde im Frühjahr erneuert, und die alte im Herbst abgetragen. ",
)
DEADLINE_S = 10


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=256 << 20) as running:
        yield running


@contextmanager
def worker(node: RunningNode, name: str, *, ranks: int) -> Iterator[RunningWorker]:
    options = (
        "--name", name, "--threads", "1", "--device", "cpu", "--pool-bytes", str(48 << 20),
        "--tensor-parallel", str(ranks),
        "--rank-deadline-ms", str(DEADLINE_S * 1_000),
    )  # fmt: skip
    with start_worker(model=ensure_model(), node=node.run_dir, options=options) as running:
        yield running


@dataclass
class Judged:
    """Asks workers, and holds their replies against the plain model's."""

    exactness: Exactness

    def ask(self, worker: RunningWorker, prompt: list[int]) -> Answer:
        answer = asyncio.run(ask(worker.address, prompt, max_tokens=REPLY))
        expected = self.exactness.reference.reply(prompt, REPLY)
        said = [token for token in answer.tokens if token not in self.exactness.reference.ends]
        self.exactness.check("ranks", prompt, expected, said)
        return answer

    def prompt(self, which: int) -> list[int]:
        tokens: list[int] = self.exactness.reference.tokenizer(
            TEXTS[which] * 14, add_special_tokens=False
        )["input_ids"]
        return tokens[:170]


@pytest.fixture(scope="module")
def judged(exactness: Exactness) -> Judged:
    return Judged(exactness)


def ranks_of(worker: RunningWorker) -> list[int]:
    """Return the pids of the other ranks: children of the worker's process."""
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children")
    tasks = children.parent.parent.glob("*/children")
    found = [int(pid) for task in tasks for pid in task.read_text().split()]
    assert len(found) == 2
    return found


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_three_ranks_and_one_share_blocks_both_ways(node: RunningNode, judged: Judged) -> None:
    with worker(node, "three", ranks=3) as three, worker(node, "one", ranks=1) as one:
        pids = ranks_of(three)
        for pid in pids:  # as a terminal's Ctrl-C and a service's stop do: rank 0 decides
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        for which, (first, second) in enumerate(((three, one), (one, three))):
            prompt = judged.prompt(which)
            cold = judged.ask(first, prompt)
            again = judged.ask(first, prompt)
            there = judged.ask(second, prompt)
            assert cached_tokens(cold.cache) == 0
            assert again.cache.hbm_tokens == 160
            assert there.cache.dram_tokens == 160
        assert three.stop() == 0
    assert gone(pids)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_ends_with_any_of_its_ranks(
    node: RunningNode, judged: Judged, kind: signal.Signals
) -> None:
    prompt = judged.prompt(0)[: 16 * 5 + 3 * int(kind)]
    with worker(node, "three", ranks=3) as three:
        pids = ranks_of(three)
        os.kill(pids[1], kind)
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as failed:
            asyncio.run(ask(three.address, prompt, max_tokens=REPLY))
        assert type(error_from(failed.value)).__name__ in ("Unreachable", "Refused")
        assert three.process.wait(DEADLINE_S + 30) == 1
        assert time.monotonic() - began < DEADLINE_S + 30
        assert gone(pids)
    with worker(node, "one", ranks=1) as one:
        judged.ask(one, prompt)  # Nothing that the dead ones wrote passes for a block.


def test_ray_keeps_a_worker_of_three_ranks_alive(judged: Judged) -> None:
    """One actor for each rank, in one bundle; the whole worker comes back when one is killed."""
    options = ("--workers", "1", "--tensor-parallel", "3", "--arena", "64MiB", "--pool", "48MiB")
    with cluster_process(*options) as cluster:
        ranks = cluster.pids("ray::RankShell")
        assert len(ranks) == 2
        prompt = judged.prompt(1)[:60]
        reply = judged.exactness.reference.reply(prompt, REPLY)

        def said(*, cache: bool) -> list[int]:
            tokens = generate(cluster.grpc, prompt, max_tokens=REPLY, cache=cache).tokens
            return [token for token in tokens if token not in judged.exactness.reference.ends]

        judged.exactness.check("ray", prompt, reply, said(cache=False))
        os.kill(ranks[0], signal.SIGKILL)
        eventually(
            lambda: len(new := set(cluster.pids("ray::RankShell"))) == 2 and not new & set(ranks),
            what="the worker starts again, with other ranks",
        )
        eventually(lambda: answers(said), what="it serves again")
        judged.exactness.check("ray, again", prompt, reply, said(cache=True))


def answers(said: Callable[..., list[int]]) -> bool:
    try:
        said(cache=False)
    except grpc.RpcError:
        return False
    return True
