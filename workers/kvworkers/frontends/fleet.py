"""The workers a frontend can call: one channel each, and what each says it serves."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import grpc.aio

from kvstore.core.errors import KvStoreError, NotFound, Unreachable
from kvstore.core.names import Root
from kvstore.router.members import Member, Members
from kvstore.rpc.channel import open_channel
from kvstore.rpc.convert import root_from_wire
from kvstore.rpc.credentials import NO_CREDENTIALS, Credentials
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import worker_pb2, worker_pb2_grpc

DESCRIBE_SECONDS: Final = 2.0
"""Deadline of one `Describe`."""

CLOSE_SECONDS: Final = 30.0
"""How long calls in flight may go on at a worker that left the member list."""

REFRESH_SECONDS: Final = 5.0
"""How old the knowledge of what a worker serves may get."""

_BACKOFF_SECONDS: Final = (0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Served:
    """What one worker serves, in its own words."""

    worker: str
    model: str
    root: Root
    max_model_tokens: int


@dataclass(frozen=True, slots=True)
class Offer:
    """What all workers of one model serve together."""

    model: str
    root: Root
    """Names prompts; the one most workers use. Others still answer, without hits."""
    max_model_tokens: int
    """The smallest, so that a request fits wherever it is sent."""
    workers: frozenset[str]


class Fleet:
    """Knows the workers of the member list; asks each what it serves until it answers."""

    def __init__(self, share_domain: str, credentials: Credentials = NO_CREDENTIALS) -> None:
        self._credentials = credentials
        self._share_domain = share_domain
        self._members = Members()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._served: dict[str, Served] = {}
        self._first = asyncio.Event()
        self._again: dict[str, asyncio.Event] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def set_members(self, members: Members) -> None:
        """Call these workers and no others; those that did not change are left alone."""
        workers = Members.of(members.workers())
        change = self._members.change_to(workers)
        for member in change.gone:
            self._leave(member.name)
        self._members = workers
        for member in change.new:
            self._channels[member.name] = open_channel(member.address, self._credentials)
            again = self._again[member.name] = asyncio.Event()
            self._asking[member.name] = asyncio.create_task(
                self._ask(member, again), name=f"describe {member.name}"
            )

    def knows(self, worker: str) -> bool:
        """Say whether a worker has told what it serves."""
        return worker in self._served

    def offers(self) -> dict[str, Offer]:
        """Return what is served at this moment, by model."""
        by_model: dict[str, list[Served]] = {}
        for served in self._served.values():
            by_model.setdefault(served.model, []).append(served)
        return {model: _offer(model, group) for model, group in sorted(by_model.items())}

    def offer(self, model: str) -> Offer:
        """Return who serves a model; "" means the only one.

        Raises `NotFound` for an unknown model and `Unreachable` while no worker has answered.
        """
        offers = self.offers()
        if not offers:
            raise Unreachable("no worker is ready yet")
        if not model and len(offers) == 1:
            return next(iter(offers.values()))
        if model not in offers:
            raise NotFound(f"the model {model!r} does not exist; there is: {', '.join(offers)}")
        return offers[model]

    async def offered(self, model: str, *, wait_ms: float) -> Offer:
        """Return the same, waiting so long for a first worker: a frontend that has just been
        restarted serves before it has heard of any.
        """
        if not self._served:
            self._first.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_ms / 1_000):
                    await self._first.wait()
        return self.offer(model)

    def stub(self, worker: str) -> worker_pb2_grpc.WorkerStub:
        """Return the stub of a worker; raises `Unreachable` when it has left."""
        channel = self._channels.get(worker)
        if channel is None:
            raise Unreachable(f"{worker} has left")
        return worker_pb2_grpc.WorkerStub(channel)

    def refresh(self, worker: str) -> None:
        """Ask a worker again what it serves: it failed, and may come back as another."""
        if worker in self._again:
            self._again[worker].set()

    async def close(self) -> None:
        """Close every channel at once."""
        tasks = [*self._asking.values(), *self._closing]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()
        self._served.clear()

    async def _ask(self, member: Member, again: asyncio.Event) -> None:
        """Ask until the worker answers (it does so only when it is ready), and now and then later:
        a worker that finds its cache node after it started names blocks under another root.
        """
        attempt = 0
        while True:
            pause = _BACKOFF_SECONDS[min(attempt, len(_BACKOFF_SECONDS) - 1)]
            attempt += 1
            with suppress(KvStoreError):
                self._served[member.name] = await self._describe_once(member)
                self._first.set()
                pause, attempt = REFRESH_SECONDS, 0
            again.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await again.wait()

    async def _describe_once(self, member: Member) -> Served:
        request = worker_pb2.DescribeRequest(share_domain=self._share_domain)
        try:
            reply = await self.stub(member.name).Describe(request, timeout=DESCRIBE_SECONDS)
        except grpc.aio.AioRpcError as failure:
            raise error_from(failure) from failure
        # A request must fit the model's context and the worker's pages.
        limit = min(reply.max_model_tokens, reply.kv_capacity_tokens or reply.max_model_tokens)
        return Served(member.name, reply.model, root_from_wire(reply.root), limit)

    def _leave(self, worker: str) -> None:
        self._served.pop(worker, None)
        self._asking.pop(worker).cancel()
        del self._again[worker]
        channel = self._channels.pop(worker)
        closing = asyncio.create_task(channel.close(CLOSE_SECONDS), name=f"close {worker}")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


def _offer(model: str, group: Iterable[Served]) -> Offer:
    served = sorted(group, key=lambda one: one.worker)
    (root, _), *_ = Counter(one.root for one in served).most_common(1)
    return Offer(
        model,
        root,
        min(one.max_model_tokens for one in served),
        frozenset(one.worker for one in served),
    )
