"""Asks the cluster over its gRPC API and keeps account of what came back."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc.aio

from kvstore.core.errors import Unreachable
from kvstore.rpc.channel import open_channel
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from kvworkers.demo.script import Conversation

_REQUEST_SECONDS: Final = 120.0
"""Deadline of one request: a cold prompt on two busy cores took 12 s."""

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One reply with its account. Times are milliseconds as the frontend and we saw them."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    cached: dict[str, int]
    ttft_ms: float
    total_ms: float
    worker: str
    places: str
    retries: int

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from any tier."""
        return sum(self.cached.values())

    @property
    def tokens_per_second(self) -> float:
        """Output rate after the first token."""
        decode_s = (self.total_ms - self.ttft_ms) / 1000
        return (len(self.tokens) - 1) / decode_s if len(self.tokens) > 1 and decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One request of one client with its answer."""

    request: int
    client: int
    turn: int
    messages: Messages
    answer: Answer


@dataclass(slots=True)
class Frontend:
    """The cluster's gRPC API over one channel."""

    address: str
    _channel: grpc.aio.Channel = field(init=False)
    _stub: Any = field(init=False)

    async def __aenter__(self) -> "Frontend":
        self._channel = open_channel(self.address)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._channel.close(None)

    async def ask(self, messages: Messages, *, max_tokens: int, cache: bool = True) -> Answer:
        """Return the greedy reply; without `cache` it is neither read nor filled.

        Raises the error that the frontend raised.
        """
        request = inference_pb2.GenerateRequest(
            messages=inference_pb2.Messages(
                messages=[inference_pb2.Message(**message) for message in messages]
            ),
            sampling=worker_pb2.Sampling(max_tokens=max_tokens),
            no_read=not cache,
            no_store=not cache,
        )
        begun = time.monotonic()
        replies = []
        try:
            async for reply in self._stub.Generate(request, timeout=_REQUEST_SECONDS):
                replies.append(reply)  # noqa: PERF401 - an error keeps what came before
        except grpc.aio.AioRpcError as failure:
            raise error_from(failure) from failure
        return _answer(replies, total_ms=(time.monotonic() - begun) * 1000)


def _answer(replies: Sequence[Any], *, total_ms: float) -> Answer:
    """Put the pieces of one stream together."""
    report = next((reply.cache for reply in replies if reply.HasField("cache")), None)
    if report is None or not replies[-1].finish_reason:
        raise Unreachable("a reply ended without its account or its end")
    packed = b"".join(reply.tokens for reply in replies)
    return Answer(
        text="".join(reply.text for reply in replies),
        tokens=tuple(memoryview(packed).cast("I")),
        finish_reason=replies[-1].finish_reason,
        prompt_tokens=report.prompt_tokens,
        cached={
            "hbm": report.hbm_tokens,
            "dram": report.dram_tokens,
            "nvme": report.nvme_tokens,
            "peer": report.peer_tokens,
        },
        ttft_ms=next(reply.ttft_ms for reply in replies if reply.ttft_ms),
        total_ms=total_ms,
        worker=next((reply.worker for reply in reversed(replies) if reply.worker), ""),
        places=report.places,
        retries=max(reply.retries for reply in replies),
    )


Heard = Callable[[Exchange], None]


class Talk:
    """Holds all conversations and numbers the exchanges as they end."""

    def __init__(self, frontend: Frontend, *, max_tokens: int, heard: Heard) -> None:
        self._frontend = frontend
        self._max_tokens = max_tokens
        self._heard = heard
        self.exchanges: list[Exchange] = []

    async def hold(self, parts: Sequence[Conversation]) -> None:
        """Hold every conversation to its end.

        The first client's first turn goes alone: it pays for the prefix that everyone shares, and
        what comes after finds it on either worker. From then on all clients talk at once.
        """
        first, *others = parts
        opening = await self._turn(first, 0, first.opening())
        async with asyncio.TaskGroup() as group:
            group.create_task(self._rest(first, 1, opening))
            for part in others:
                group.create_task(self._rest(part, 0, part.opening()))

    async def _rest(self, part: Conversation, turn: int, messages: Messages) -> None:
        for number in range(turn, len(part.questions)):
            messages = await self._turn(part, number, messages)

    async def _turn(self, part: Conversation, turn: int, messages: Messages) -> Messages:
        """Ask once; return the messages of the next turn. `messages` of turn > 0 lack nothing."""
        answer = await self._frontend.ask(messages, max_tokens=self._max_tokens)
        exchange = Exchange(
            request=len(self.exchanges),
            client=part.client,
            turn=turn,
            messages=messages,
            answer=answer,
        )
        self.exchanges.append(exchange)
        self._heard(exchange)
        following = turn + 1
        if following == len(part.questions):
            return messages
        return part.after(messages, answer.text, turn=following)


@dataclass(frozen=True, slots=True)
class Pair:
    """Time to first token of one prompt, out of the cache and without it."""

    prompt_tokens: int
    hit_tokens: int
    hit_ms: float
    cold_ms: float


async def measure_pairs(
    frontend: Frontend,
    exchanges: Sequence[Exchange],
    *,
    limit: int,
    measured: Callable[[Pair], Awaitable[None] | None] = lambda pair: None,
) -> list[Pair]:
    """Ask the longest prompts again, one at a time, each with the cache and then without."""
    longest = sorted(exchanges, key=lambda e: (-e.answer.prompt_tokens, e.request))[:limit]
    pairs = []
    for exchange in longest:
        hit = await frontend.ask(exchange.messages, max_tokens=1)
        cold = await frontend.ask(exchange.messages, max_tokens=1, cache=False)
        pair = Pair(hit.prompt_tokens, hit.cached_tokens, hit.ttft_ms, cold.ttft_ms)
        pairs.append(pair)
        measured(pair)
    return pairs
