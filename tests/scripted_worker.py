"""A worker without a model: real gRPC, real `Watch`, scripted tokens, and faults on demand.

Run as a process (`python tests/scripted_worker.py --name w`) it can be killed and stopped like a
real one; in a test's own loop its fields can be read.

It answers every prompt with `reply`, and continues a prompt that already ends with a part of it,
as a model that decodes greedily would.
"""

import argparse
import asyncio
import json
import os
import signal
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput, KvStoreError, Refused
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import BlockName, ExtraKey, Root, chain, pack_tokens
from kvstore.directory.events import Changed, Loaded, TierKind, WorkerRole
from kvstore.directory.publisher import Publisher
from kvstore.observe.metrics import RedisMetrics
from kvstore.rpc.channel import NO_SECURITY, listen, make_server
from kvstore.rpc.gate import gate_of
from kvstore.rpc.redis_publisher import RedisPublisher
from kvstore.rpc.redis_stream import RedisConfig
from kvstore.rpc.security import SecurityConfig
from kvstore.rpc.v1 import cache_pb2_grpc, types_pb2, watch_pb2, worker_pb2, worker_pb2_grpc
from kvstore.rpc.watch_server import serve_watch

ROOT = Root(bytes(range(32)))


class Shelf:
    """What the double holds: a set of names that can be scanned in slices."""

    def __init__(self, tier: TierKind) -> None:
        self.tier = tier
        self.names: dict[BlockName, None] = {}

    def scan(self, cursor: int, limit: int) -> tuple[list[Changed], int | None]:
        names = list(self.names)[cursor : cursor + limit]
        after = cursor + limit
        return [Changed(ROOT, self.tier, names)], after if after < len(self.names) else None


@dataclass
class Faults:
    """What goes wrong in `Run`, after so many tokens; -1: nothing."""

    die_after: int = -1
    hang_after: int = -1
    break_after: int = -1
    refuse: KvStoreError | None = None


@dataclass
class ScriptedWorker:
    """One double; `start` makes it listen."""

    name: str
    reply: Sequence[int] = tuple(range(65, 91))
    tier: TierKind = TierKind.HBM
    host: str = "host-a"
    role: WorkerRole = WorkerRole.BOTH
    model: str = "scripted"
    incarnation: int = 1
    max_model_tokens: int = 4096
    step_s: float = 0.0
    mark_period_ms: int = 50
    events_redis: str = ""
    faults: Faults = field(default_factory=Faults)
    requests: list[worker_pb2.RunRequest] = field(default_factory=list)
    cancelled: int = 0
    running: int = 0
    address: str = ""
    security: SecurityConfig = NO_SECURITY

    def __post_init__(self) -> None:
        self.shelf = Shelf(self.tier)
        self.publisher = Publisher(
            self.name, self.incarnation, [self.tier], self.shelf, host=self.host
        )
        if self.tier is TierKind.HBM:
            self.publisher.load = Loaded(
                prefill_tokens_per_s=1_000.0, kv_capacity_bytes=1 << 20, role=self.role
            )

    async def start(self, address: str = "127.0.0.1:0") -> str:
        self._server, _ = make_server(gate=gate_of(self.security, CollectorRegistry()))
        if self.tier is TierKind.HBM:
            worker_pb2_grpc.add_WorkerServicer_to_server(_Worker(self), self._server)
        else:
            cache_pb2_grpc.add_CacheNodeServicer_to_server(_Node(self), self._server)
        self.address = listen(self._server, address, self.security)
        await self._server.start()
        writer = RedisConfig(url=self.events_redis or "redis://", mark_period_ms=50)
        self._redis = asyncio.create_task(
            RedisPublisher(self.publisher, writer, RedisMetrics(CollectorRegistry())).run()
            if self.events_redis
            else asyncio.sleep(0)
        )
        return self.address

    async def stop(self) -> None:
        self._redis.cancel()
        await asyncio.gather(self._redis, return_exceptions=True)
        await self._server.stop(0)

    def hold(self, names: Sequence[BlockName]) -> None:
        new = [name for name in dict.fromkeys(names) if name not in self.shelf.names]
        self.shelf.names.update(dict.fromkeys(new))
        self.publisher.set(ROOT, self.tier, new)

    def drop(self, names: Sequence[BlockName]) -> None:
        gone = [name for name in dict.fromkeys(names) if name in self.shelf.names]
        for name in gone:
            del self.shelf.names[name]
        self.publisher.delete(ROOT, self.tier, gone)

    async def run(self, request: worker_pb2.RunRequest) -> AsyncIterator[worker_pb2.RunReply]:
        """Stream the scripted reply, one token a message."""
        self.requests.append(request)
        if self.faults.refuse is not None:
            raise self.faults.refuse
        tokens = array("I", request.tokens)
        if len(tokens) + request.sampling.max_tokens > self.max_model_tokens:
            raise BadInput("over the model's context")
        names = self.names_of(request.tokens, request.cache_salt)
        done = self._done(tokens)
        first = self._first(len(tokens), names)
        wanted = min(request.sampling.max_tokens, len(self.reply) - done)
        for at in range(wanted):
            await self._fault(at)
            await asyncio.sleep(self.step_s)
            reply = worker_pb2.RunReply(tokens=pack_tokens([self.reply[done + at]]))
            if request.sampling.logprobs:
                chosen = self.reply[done + at]  # and then the likeliest ones, itself the first
                reply.logprobs.add(token_ids=[chosen, chosen, 1], logprobs=[-0.5, -0.5, -1.5])
            if at == 0:
                reply.MergeFrom(first)
            yield reply
        await self._fault(wanted)
        ended = done + wanted == len(self.reply)
        yield worker_pb2.RunReply(finish_reason="stop" if ended else "length")
        self.hold(names)

    def names_of(self, tokens: bytes, salt: bytes) -> list[BlockName]:
        """Return the names of a prompt's blocks, as a real worker derives them."""
        return list(chain(ROOT, tokens, extra_keys=[ExtraKey(0, salt)] if salt else ()))

    def _done(self, tokens: Sequence[int]) -> int:
        """Return how much of the reply the prompt already ends with."""
        longest = min(len(self.reply), len(tokens))
        for length in range(longest, 0, -1):
            if list(tokens[-length:]) == list(self.reply[:length]):
                return length
        return 0

    def _first(self, prompt_tokens: int, names: Sequence[BlockName]) -> worker_pb2.RunReply:
        held = 0
        while held < len(names) and names[held] in self.shelf.names:
            held += 1
        cached = min(held, (prompt_tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
        return worker_pb2.RunReply(
            ttft_ms=1.0,
            cache=types_pb2.CacheReport(
                prompt_tokens=prompt_tokens,
                hbm_tokens=cached,
                computed_tokens=prompt_tokens - cached,
                miss_reason=types_pb2.MISS_REASON_ABSENT,
                places=self.name,
            ),
        )

    async def _fault(self, at: int) -> None:
        if at == self.faults.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if at == self.faults.hang_after:
            await asyncio.Event().wait()
        if at == self.faults.break_after:
            raise RuntimeError("scripted failure")


class _Worker(worker_pb2_grpc.WorkerServicer):  # type: ignore[misc]
    def __init__(self, script: ScriptedWorker) -> None:
        self.script = script

    async def Describe(self, request: Any, context: Any) -> worker_pb2.DescribeReply:
        script = self.script
        return worker_pb2.DescribeReply(
            worker=script.name,
            incarnation=script.incarnation,
            host=script.host,
            model=script.model,
            root=ROOT,
            max_model_tokens=script.max_model_tokens,
        )

    async def Run(
        self, request: worker_pb2.RunRequest, context: Any
    ) -> AsyncIterator[worker_pb2.RunReply]:
        self.script.running += 1
        try:
            async for reply in self.script.run(request):
                yield reply
        except (asyncio.CancelledError, GeneratorExit):
            self.script.cancelled += 1
            raise
        finally:
            self.script.running -= 1

    async def Watch(
        self, request: watch_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[watch_pb2.WatchReply]:
        script = self.script
        async for reply in serve_watch(
            script.publisher, request, mark_period_ms=script.mark_period_ms
        ):
            yield reply


class _Node(cache_pb2_grpc.CacheNodeServicer):  # type: ignore[misc]
    def __init__(self, script: ScriptedWorker) -> None:
        self.script = script

    async def Watch(
        self, request: watch_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[watch_pb2.WatchReply]:
        script = self.script
        async for reply in serve_watch(
            script.publisher, request, mark_period_ms=script.mark_period_ms
        ):
            yield reply


async def _serve(options: argparse.Namespace) -> None:
    faults = Faults(die_after=options.die_after, hang_after=options.hang_after)
    if options.refuse:
        faults.refuse = Refused("scripted refusal", 250)
    worker = ScriptedWorker(
        options.name,
        tier=TierKind[options.tier],
        incarnation=options.incarnation,
        faults=faults,
        step_s=options.step_s,
        events_redis=options.events_redis,
        reply=[ord(letter) for letter in options.reply],
        role=WorkerRole(options.role),
    )
    address = await worker.start(options.listen)
    prompt = pack_tokens(range(options.hold * BLOCK_TOKENS))
    worker.hold(list(chain(ROOT, prompt)))
    with os.fdopen(1, "w") as out:
        out.write(json.dumps({"address": address, "pid": os.getpid()}) + "\n")
    await asyncio.Event().wait()


def main() -> None:
    """Serve until killed; one JSON line on standard output says where."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--tier", default="HBM")
    parser.add_argument("--incarnation", type=int, default=1)
    parser.add_argument("--hold", type=int, default=0)
    parser.add_argument("--die-after", type=int, default=-1)
    parser.add_argument("--hang-after", type=int, default=-1)
    parser.add_argument("--events-redis", default="")
    parser.add_argument("--role", default="both")
    parser.add_argument("--refuse", action="store_true")
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--reply", default="ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
