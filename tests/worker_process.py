"""Starts real worker processes for tests, and talks to them."""

import json
import os
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore.core.names import pack_tokens
from kvstore.rpc.channel import open_channel
from kvstore.rpc.v1 import types_pb2, worker_pb2, worker_pb2_grpc
from tests.patience import PATIENCE_MS, PATIENCE_S


@dataclass
class Answer:
    """Everything that one Run said."""

    tokens: list[int] = field(default_factory=list)
    cache: types_pb2.CacheReport = field(default_factory=types_pb2.CacheReport)
    """Empty (no prompt tokens) until the first tokens came."""
    ttft_ms: float = 0.0
    load_ms: float = 0.0
    finish_reason: str = ""
    logprobs: list[worker_pb2.TokenLogprobs] = field(default_factory=list)


@dataclass
class RunningWorker:
    """A worker process and how to reach it."""

    process: "subprocess.Popen[bytes]"
    address: str
    metrics: str

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=PATIENCE_S)


@contextmanager
def start_worker(
    *, model: Path, node: Path | None = None, options: tuple[str, ...] = ()
) -> Iterator[RunningWorker]:
    """Run `python -m kvworkers.worker`; ended by its pid afterwards."""
    command = [sys.executable, "-m", "kvworkers.worker", "--model", str(model), "--json"]
    command += ["--store-call-ms", str(PATIENCE_MS), *options]
    if node is not None:
        command += ["--node", str(node)]
    root = Path(__file__).resolve().parents[1]
    paths = [
        str(root),
        str(root / "workers"),
        str(root / "kernels"),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the worker ended with {process.wait(timeout=PATIENCE_S)}"
        ready = json.loads(line)
        assert ready["pid"] == process.pid
        yield RunningWorker(process, ready["address"], ready["metrics"])
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()


async def ask(
    address: str,
    prompt: list[int],
    *,
    max_tokens: int = 8,
    sampling: dict[str, Any] | None = None,
    **fields: Any,
) -> Answer:
    """Run one request and gather everything it says."""
    request = worker_pb2.RunRequest(
        request_id="test",
        tokens=pack_tokens(prompt),
        sampling=worker_pb2.Sampling(max_tokens=max_tokens, **(sampling or {})),
        **fields,
    )
    answer = Answer()
    async with open_channel(address) as channel:
        async for reply in worker_pb2_grpc.WorkerStub(channel).Run(request, timeout=120):
            take(answer, reply)
    return answer


def take(answer: Answer, reply: worker_pb2.RunReply) -> None:
    """Add one message to an answer."""
    tokens = array("I")
    tokens.frombytes(reply.tokens)
    answer.tokens += tokens.tolist()
    answer.logprobs += list(reply.logprobs)
    if reply.HasField("cache"):
        assert not answer.cache.prompt_tokens, "the account comes once"
        answer.cache, answer.ttft_ms, answer.load_ms = reply.cache, reply.ttft_ms, reply.load_ms
    answer.finish_reason = reply.finish_reason or answer.finish_reason


def cached_tokens(cache: types_pb2.CacheReport) -> int:
    """Return tokens that were not computed, after checking that the account adds up."""
    cached = (
        cache.hbm_tokens + cache.dram_tokens + cache.nvme_tokens + cache.peer_tokens
        + cache.files_tokens
    )  # fmt: skip
    assert cached + cache.computed_tokens == cache.prompt_tokens
    return int(cached)
