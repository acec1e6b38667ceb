"""How soon a new router is ready, and what decisions cost it meanwhile: real gRPC, two processes.

One process plays all publishers and holds `blocks` blocks; the router here follows them through
`Watch` as always, while a task asks for a decision every few milliseconds.
"""

import asyncio
import multiprocessing
import os
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

from prometheus_client import CollectorRegistry

from kvstore.core.errors import KvStoreError, Unreachable
from kvstore.core.limits import BLOCK_TOKENS, NAME_BYTES
from kvstore.core.names import BlockName, Root, split_names
from kvstore.directory.events import Changed, Loaded, TierKind
from kvstore.directory.publisher import Publisher
from kvstore.directory.view import Health
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.members import Kind, Member, Members
from kvstore.router.placement import Prompt
from kvstore.router.router import Router
from kvstore.rpc.channel import listen, make_server
from kvstore.rpc.interceptors import Context
from kvstore.rpc.v1 import cache_pb2_grpc, watch_pb2, worker_pb2_grpc
from kvstore.rpc.watch_server import serve_watch

WORKERS: Final = 16
HOSTS: Final = 2
ROOT: Final = Root(b"bench root of a start".ljust(NAME_BYTES, b"."))
DEADLINE_S: Final = 60.0
_EVERY_S: Final = 0.004
"""Pause between two decisions: 250 a second."""
_PROMPT_BLOCKS: Final = 2_048
_FEW: Final = 256
_LATER: Final = 200
_WARM_UP: Final = 3
"""Decisions made before: the first ones fill the interpreter's caches."""


class _Held:
    """Holdings of a publisher: names that nobody computed."""

    def __init__(self, tier: TierKind, count: int) -> None:
        self._tier = tier
        self.names = split_names(os.urandom(count * NAME_BYTES))

    def scan(self, cursor: int, limit: int) -> tuple[list[Changed], int | None]:
        after = cursor + limit
        part = Changed(ROOT, self._tier, self.names[cursor:after])
        return [part], after if after < len(self.names) else None


class _Serves(cache_pb2_grpc.CacheNodeServicer, worker_pb2_grpc.WorkerServicer):  # type: ignore[misc]
    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def Watch(
        self, request: watch_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[watch_pb2.WatchReply]:
        async for reply in serve_watch(self._publisher, request):
            yield reply


async def _publish(pipe: Connection, blocks: int) -> None:
    """Serve all publishers until the other end closes the pipe."""
    kinds: list[Kind] = [*["worker"] * WORKERS, *["node"] * HOSTS]  # type: ignore[list-item]
    members: list[tuple[Kind, str, str, str]] = []
    servers = []
    for number, kind in enumerate(kinds):
        tier = TierKind.HBM if kind == "worker" else TierKind.DRAM
        name, host = f"{kind}-{number}", f"host-{number % HOSTS}"
        # One worker is ready at once: there is somebody to choose while the rest is learnt.
        held = _Held(tier, blocks // (len(kinds) - 1) if number else _FEW)
        publisher = Publisher(name, 1, [tier], held, host=host)
        publisher.set(ROOT, tier, held.names)
        if kind == "worker":
            publisher.load = Loaded(prefill_tokens_per_s=25_000.0, kv_capacity_bytes=100)
        server, _ = make_server()
        serves = _Serves(publisher)
        cache_pb2_grpc.add_CacheNodeServicer_to_server(serves, server)
        worker_pb2_grpc.add_WorkerServicer_to_server(serves, server)
        members.append((kind, name, listen(server, "127.0.0.1:0"), host))
        await server.start()
        servers.append(server)
    pipe.send(members)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), ended.set)
    await ended.wait()
    for server in servers:
        await server.stop(0)


def _publishers(pipe: Connection, blocks: int) -> None:
    asyncio.run(_publish(pipe, blocks))


@dataclass(frozen=True, slots=True)
class Start:
    """What a start took, and every decision's seconds from when it was due to its answer."""

    ready_s: float
    decisions_s: list[float]
    later_s: list[float]
    """The same once everything was learnt: what loop and machine add by themselves."""
    blocks: int


async def measure_start(blocks: int) -> Start:
    """Start a router beside publishers that hold `blocks`; raises `Unreachable` at a deadline."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_publishers, args=(theirs, blocks), daemon=True)
    process.start()
    theirs.close()
    try:
        if not await asyncio.to_thread(ours.poll, DEADLINE_S):
            raise Unreachable(f"the publishers were not ready in {DEADLINE_S} s")
        members = Members.of(Member(kind, name, at, host) for kind, name, at, host in ours.recv())
        async with asyncio.timeout(DEADLINE_S):
            return await _start(members)
    except TimeoutError:
        raise Unreachable(f"the router was not ready in {DEADLINE_S} s") from None
    finally:
        ours.close()
        await asyncio.to_thread(process.join, 5)
        if process.is_alive():
            process.kill()
            process.join()


async def _start(members: Members) -> Start:
    router = Router(metrics=RouterMetrics(CollectorRegistry()))
    names = [BlockName(name) for name in split_names(os.urandom(_PROMPT_BLOCKS * NAME_BYTES))]
    prompt = Prompt(ROOT, names, _PROMPT_BLOCKS * BLOCK_TOKENS)
    async with router:
        started_s = time.perf_counter()
        router.set_members(members)
        times: list[float] = []
        while any(router.health(member.name) is not Health.LIVE for member in members):
            times += await _decide_when_due(router, prompt)
        ready_s = time.perf_counter() - started_s
        later: list[float] = []
        for _ in range(_LATER):
            later += await _decide_when_due(router, prompt)
        return Start(ready_s, times[_WARM_UP:], later, router.view_blocks)


async def _decide_when_due(router: Router, prompt: Prompt) -> list[float]:
    """Return the seconds from when a decision was due to its answer; none where nobody is alive."""
    loop = asyncio.get_running_loop()
    due_s = loop.time() + _EVERY_S
    await asyncio.sleep(_EVERY_S)
    try:
        router.explain(prompt)
    except KvStoreError:
        return []
    return [loop.time() - due_s]


def percentile_ms(times: list[float], hundredth: int) -> float:
    """Return a percentile in milliseconds; 0 where there are not two values."""
    if len(times) < 2:
        return 0.0
    return statistics.quantiles(times, n=100, method="inclusive")[hundredth - 1] * 1e3
