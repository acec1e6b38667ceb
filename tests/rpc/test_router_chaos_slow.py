"""Real processes are killed under load: what users see, and how long it takes to be over.

Three workers, a node, Redis between them and two frontends with a router each. The workers are
scripted, so that a reply that lost, doubled or changed a token is seen at once.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import grpc.aio
import pytest
from kvworkers.frontends.pipeline import PipelineConfig
from kvworkers.frontends.server import FrontendConfig, FrontendServer, serving

from kvstore.router.members import Member
from kvstore.router.router import RouterConfig
from kvstore.rpc.channel import open_channel
from kvstore.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from tests.byte_tokenizer import make_byte_tokenizer
from tests.processes import Started, scripted, started
from tests.redis_process import RedisProcess, needs_redis, redis_process

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
USERS = 6
HUNG_S = 10.0
DETECTED_S = 2.0

pytestmark = [pytest.mark.slow, needs_redis]


@dataclass
class Load:
    """Users who ask one frontend again and again."""

    address: str
    replies: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    workers: list[tuple[float, str]] = field(default_factory=list)
    """When a request began, and who answered it in the end."""
    failed: list[str] = field(default_factory=list)

    async def ask(self, user: int) -> None:
        async with open_channel(self.address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            for turn in range(10_000):
                began = time.monotonic()
                request = inference_pb2.GenerateRequest(
                    text=f"user {user} turn {turn} " + "x" * 40,
                    sampling=worker_pb2.Sampling(max_tokens=100),
                )
                try:
                    got = [reply async for reply in stub.Generate(request, timeout=HUNG_S)]
                except grpc.aio.AioRpcError as error:
                    self.failed.append(f"{error.code().name}: {error.details()}")
                    return
                self.replies.append("".join(reply.text for reply in got))
                self.ended.append(time.monotonic())
                self.seconds.append(self.ended[-1] - began)
                self.workers += [(began, reply.worker) for reply in got if reply.worker][-1:]

    @asynccontextmanager
    async def going(self) -> AsyncIterator["Load"]:
        tasks = [asyncio.create_task(self.ask(user)) for user in range(USERS)]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def more(self, count: int) -> float:
        """Wait for so many more replies; returns the longest time between two of them."""
        first, since = len(self.ended), time.monotonic()
        await eventually(lambda: len(self.ended) >= first + count or bool(self.failed))
        times = [since, *self.ended[first:]]
        return max(later - sooner for sooner, later in pairwise(times))


async def eventually(condition: Callable[[], bool], seconds: float = HUNG_S) -> float:
    """Return after how many seconds the condition held."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
    return time.monotonic() - began


def members(processes: dict[str, Started]) -> list[Member]:
    return [
        Member("node" if name == "node" else "worker", name, str(one.ready["address"]), "host-a")
        for name, one in processes.items()
    ]


async def all_ready(frontend: FrontendServer) -> None:
    await eventually(lambda: all(map(frontend.worker_ready, ("w0", "w1", "w2"))))


async def kill_a_worker(
    load: Load, frontend: FrontendServer, processes: dict[str, Started],
    start: Callable[..., Started],
) -> str:  # fmt: skip
    first = len(load.workers)
    processes["w1"].kill()
    killed = time.monotonic()
    noticed_s = await eventually(lambda: not frontend.worker_ready("w1"), DETECTED_S)
    gap_s = await load.more(3 * USERS)
    late = [w for began, w in load.workers[first:] if w == "w1" and began > killed + noticed_s]
    assert not late, "requests went to the dead"
    again = ("--incarnation", "2", "--listen", str(processes["w1"].ready["address"]))
    processes["w1"] = start("w1", *again)
    back_s = await eventually(lambda: frontend.worker_ready("w1"))
    return (f"worker: noticed in {noticed_s:.2f} s, {gap_s:.2f} s between replies at most, "
            f"back {back_s:.2f} s after its start")  # fmt: skip


async def kill_redis(load: Load, frontend: FrontendServer, redis: RedisProcess) -> str:
    redis.kill()
    gap_s = await load.more(4 * USERS)
    away = all(map(frontend.worker_ready, ("w0", "w1", "w2")))
    redis.start()
    await load.more(4 * USERS)
    await all_ready(frontend)
    assert away, "workers were given up although only Redis was away"
    return f"redis: {gap_s:.2f} s between replies at most; workers watched directly meanwhile"


async def test_nothing_hangs_and_no_token_is_lost_whoever_dies(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def say(line: str) -> None:
        with capfd.disabled():
            sys.stdout.write(f"\nchaos: {line}\n")

    model = make_byte_tokenizer(tmp_path)
    with ExitStack() as stack:
        redis = stack.enter_context(redis_process())
        flags = ("--events-redis", redis.url, "--step-s", "0.01")

        def start(name: str, *arguments: str) -> Started:
            return stack.enter_context(scripted(name, *flags, *arguments))

        processes = {name: start(name) for name in ("w0", "w1", "w2")}
        processes["node"] = start("node", "--tier", "DRAM")
        config = FrontendConfig(
            model=model,
            pipeline=PipelineConfig(lost_after_ms=1_500, wait_ms=4_000, other_wait_ms=300),
            router=RouterConfig(events_redis=redis.url),
        )
        flag = [f"--worker={m.name}={m.address}" for m in members(processes) if m.kind == "worker"]
        other = stack.enter_context(
            started(["-m", "kvworkers.frontends", "--json", "--model", str(model),
                     "--http", "127.0.0.1:0", "--events-redis", redis.url, *flag])
        )  # fmt: skip
        async with serving(config) as frontend:
            await frontend.set_members(members(processes))
            await all_ready(frontend)
            load, beside = Load(frontend.grpc_address), Load(str(other.ready["grpc"]))
            async with load.going(), beside.going():
                await load.more(USERS)
                await beside.more(USERS)
                say(await kill_a_worker(load, frontend, processes, start))
                processes["node"].kill()
                say(f"node: {await load.more(3 * USERS):.2f} s between replies at most")
                say(await kill_redis(load, frontend, redis))
                assert not beside.failed
                other.kill()
                ended_s = await eventually(lambda: len(beside.failed) == USERS)
                gap_s = await load.more(3 * USERS)
                say(f"router: its {USERS} streams ended in {ended_s:.2f} s, the other one "
                    f"answered with {gap_s:.2f} s between replies at most")  # fmt: skip
            assert not load.failed, load.failed
            for reply in [*load.replies, *beside.replies]:
                assert reply == LETTERS, "a token was lost, doubled or changed"
            assert max(load.seconds) < HUNG_S
            say(f"{len(load.replies)} replies, the slowest {max(load.seconds):.2f} s")
