"""The one path of a request, for HTTP and gRPC alike.

    render + tokenise → name → route → Worker.Run → detokenise → chunks
                          ▲                 │ worker lost: tokens so far are kept,
                          └─────────────────┘ and the rest is asked of another one

Nothing here decides where a request goes (the router does) or what a token is (the worker does).
"""

import time
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Final

from kvstore.core.errors import (
    BadInput,
    Corrupt,
    KvStoreError,
    NotFound,
    Refused,
    SessionLost,
    TooLarge,
    Unreachable,
)
from kvstore.core.names import BlockName, ExtraKey, chain
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.learning import Actual
from kvstore.router.placement import Decision, Prompt
from kvstore.router.router import Router
from kvstore.rpc.v1 import worker_pb2
from kvworkers.frontends.attempt import attempt
from kvworkers.frontends.fleet import Fleet, Offer
from kvworkers.frontends.generation import CacheAccount, Chunk, Generation, TokenChance
from kvworkers.frontends.text import Detokeniser, StopMatcher
from kvworkers.frontends.tokenizer import ChatTokenizer

WORTH_RETRYING: Final = (Unreachable, SessionLost, Refused, Corrupt)
"""Failures that another worker, or the same one later, need not repeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """Bounds and patience of the serving path."""

    share_domain: str = "default"
    default_max_tokens: int = 512
    """Where a request names none: workers reserve pages for all of it."""
    max_in_flight: int = 1_024
    """Requests running at once in this frontend; more are refused."""
    retries: int = 3
    """Workers a request may lose or be refused by."""
    deadline_ms: int = 300_000
    """Of a whole request that names none."""
    lost_after_ms: float = 5_000
    """A worker whose `Watch` is silent this long while it owes tokens is given up."""
    wait_ms: float = 5_000
    """How long a request waits for any worker to be alive."""
    other_wait_ms: float = 500
    """How long a retry waits for another worker before the failed one may be asked again."""

    def __post_init__(self) -> None:
        for name in ("default_max_tokens", "max_in_flight", "deadline_ms", "lost_after_ms"):
            if getattr(self, name) <= 0:
                raise BadInput(f"frontend {name} must be positive, got {getattr(self, name)}")
        if min(self.retries, self.wait_ms, self.other_wait_ms) < 0:
            raise BadInput("frontend retries, wait_ms and other_wait_ms must not be negative")


@dataclass(slots=True)
class Running:
    """A request on its way: what was asked, and what came of it so far."""

    request: Generation
    offer: Offer
    prompt: "array[int]"
    max_tokens: int
    arrived: float
    """`time.monotonic()` seconds."""
    deadline: float
    detokeniser: Detokeniser
    matcher: StopMatcher
    output: "array[int]"
    retries: int = 0
    ttft_ms: float = 0.0
    cache: CacheAccount | None = None

    @property
    def left_s(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()


class Pipeline:
    """Serves requests over a router and a fleet of workers."""

    def __init__(
        self,
        *,
        config: PipelineConfig,
        tokenizer: ChatTokenizer,
        router: Router,
        fleet: Fleet,
        metrics: RouterMetrics,
    ) -> None:
        self.tokenizer = tokenizer
        self.fleet = fleet
        self._config = config
        self._router = router
        self._metrics = metrics
        self._in_flight = 0
        self._preparing = 0

    async def prepare(self, request: Generation) -> Running:
        """Tokenise and check a request.

        Raises `NotFound` for an unknown model, `TooLarge` for a prompt over the context, `BadInput`
        for anything else that the caller must change, `Unreachable` before any worker is ready,
        `Refused` when too many requests are here already.
        """
        self._preparing += 1
        try:
            if self._in_flight + self._preparing > self._config.max_in_flight:
                running = self._in_flight + self._preparing - 1
                raise Refused(f"{running} requests are running here already", 1_000)
            return await self._prepare(request)
        except KvStoreError as error:
            self._metrics.requests.labels(outcome=type(error).__name__).inc()
            raise
        finally:
            self._preparing -= 1

    async def _prepare(self, request: Generation) -> Running:
        arrived = time.monotonic()
        offer = await self.fleet.offered(request.model, wait_ms=self._config.wait_ms)
        prompt = await self._tokenise(request)
        room = offer.max_model_tokens - len(prompt)
        asked = request.sampling.max_tokens
        if room < 1 or (asked is not None and asked > room):
            wanted = "" if asked is None else f" and max_tokens {asked}"
            raise TooLarge(
                f"the model's context is {offer.max_model_tokens} tokens; the prompt has"
                f" {len(prompt)}{wanted}"
            )
        deadline_ms = request.deadline_ms or self._config.deadline_ms
        return Running(
            request=request,
            offer=offer,
            prompt=prompt,
            max_tokens=asked or min(self._config.default_max_tokens, room),
            arrived=arrived,
            deadline=arrived + deadline_ms / 1_000,
            detokeniser=Detokeniser(self.tokenizer.decode),
            matcher=StopMatcher(request.stop),
            output=array("I"),
        )

    async def run(self, running: Running) -> AsyncGenerator[Chunk, None]:
        """Yield chunks until the last one, which has a `finish_reason`.

        Closing the generator cancels the worker's call. Raises `Refused` when every worker is full
        or none is alive, `Unreachable` when workers were lost too often or the deadline passed.
        """
        if self._in_flight >= self._config.max_in_flight:
            self._metrics.requests.labels(outcome="Refused").inc()
            raise Refused(f"{self._in_flight} requests are running here already", 1_000)
        self._in_flight += 1
        self._metrics.in_flight.set(self._in_flight)
        self._metrics.prompt_tokens.inc(len(running.prompt))
        outcome = "cancelled"
        try:
            async with aclosing(self._chunks(running)) as chunks:
                async for chunk in chunks:
                    # Counted before it is given out: nobody may come back for more.
                    outcome = chunk.finish_reason or outcome
                    yield chunk
        except KvStoreError as error:
            outcome = type(error).__name__
            raise
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.set(self._in_flight)
            self._metrics.requests.labels(outcome=outcome).inc()
            self._observe_pace(running)

    async def _tokenise(self, request: Generation) -> "array[int]":
        if request.messages is not None:
            return await self.tokenizer.conversation(request.messages)
        if request.text is not None:
            return await self.tokenizer.text(request.text)
        assert request.tokens is not None, "checked when the request was made"
        limit = self.tokenizer.vocabulary
        if max(request.tokens) >= limit:
            raise BadInput(f"token id {max(request.tokens)} is outside the vocabulary of {limit}")
        return array("I", request.tokens)

    async def _chunks(self, running: Running) -> AsyncGenerator[Chunk, None]:
        """Ask one worker after the other until the reply is whole."""
        failed: set[str] = set()
        while True:
            decision = await self._place(running, failed)
            try:
                async with aclosing(self._from_worker(running, decision)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                        if chunk.finish_reason:
                            return
            except WORTH_RETRYING as error:
                if reason := self._ended(running):
                    # It was lost after its last token: only the end was not said.
                    self._router.complete(decision.booking, failed=True)
                    yield self._last(running, decision.worker, reason, stopped=False)
                    return
                self._count_failure(running, decision, error, failed)

    def _ended(self, running: Running) -> str:
        """Return why the tokens so far are a whole reply; empty when they are not."""
        sampling = running.request.sampling
        last = running.output[-1] if running.output else -1
        if last in sampling.stop_token_ids:
            return "stop"
        if last in self.tokenizer.eos_token_ids and not sampling.ignore_eos:
            return "stop"
        return "length" if len(running.output) >= running.max_tokens else ""

    async def _place(self, running: Running, failed: set[str]) -> Decision:
        """Choose a worker; one that failed is asked again only when there is no other."""
        with suppress(NotFound, Unreachable):  # workers may have come since; none is as good as old
            running.offer = self.fleet.offer(running.offer.model)
        packed = (running.prompt + running.output).tobytes()
        salt, names = running.request.cache_salt, list[BlockName]()
        # What reads no cache hits nowhere: without names it is priced as all uncached.
        if not running.request.no_read and salt:
            names = list(chain(running.offer.root, packed, extra_keys=[ExtraKey(0, salt)]))
        elif not running.request.no_read:
            names = self._router.names(running.offer.root, packed)
        tokens, keeps = len(packed) // 4, not running.request.no_store

        domain = running.request.share_domain or self._config.share_domain

        def prompt(exclude: Sequence[str]) -> Prompt:
            return Prompt(
                running.offer.root, names, tokens, frozenset(exclude), running.offer.workers,
                keeps, domain=domain, priority=running.request.priority,
            )  # fmt: skip

        left_ms = running.left_s * 1_000
        if failed:
            try:
                wait_ms = min(self._config.other_wait_ms, left_ms)
                return await self._router.route(prompt(sorted(failed)), wait_ms=wait_ms)
            except Refused:
                failed.clear()
        alive_ms = min(self._config.wait_ms, left_ms)
        return await self._router.route(prompt(()), wait_ms=alive_ms, deadline_ms=left_ms)

    def _count_failure(
        self, running: Running, decision: Decision, error: KvStoreError, failed: set[str]
    ) -> None:
        """Note a failed attempt; raises `error` again when it was the last one allowed."""
        running.retries += 1
        self._router.complete(decision.booking, failed=not isinstance(error, Refused))
        self.fleet.refresh(decision.worker)
        failed.add(decision.worker)
        if running.left_s <= 0:
            raise Unreachable("the request's deadline passed") from error
        if running.retries > self._config.retries:
            raise error
        self._metrics.retries.labels(reason=type(error).__name__).inc()

    async def _from_worker(
        self, running: Running, decision: Decision
    ) -> AsyncGenerator[Chunk, None]:
        """Yield what one worker adds to the reply."""
        request = running.request
        run = worker_pb2.RunRequest(
            request_id=request.request_id,
            tokens=(running.prompt + running.output).tobytes(),
            sampling=request.sampling.to_proto(running.max_tokens - len(running.output)),
            share_domain=self._config.share_domain,
            no_store=request.no_store,
            no_read=request.no_read,
            cache_salt=request.cache_salt,
            deadline_ms=max(1, int(running.left_s * 1_000)),
            priority=request.priority,
        )
        replies = attempt(
            self.fleet.stub(decision.worker),
            run,
            timeout_s=max(0.001, running.left_s),
            silence_ms=lambda: self._router.silence_ms(decision.worker),
            lost_after_ms=self._config.lost_after_ms,
        )
        sent = time.monotonic()
        try:
            async with aclosing(replies):
                async for reply in replies:
                    if reply.HasField("cache"):
                        self._learn(decision, reply, sent)
                    chunk = self._chunk(running, decision.worker, reply)
                    if chunk is not None:
                        if chunk.finish_reason:
                            # Before it is given out: nobody may come back for more.
                            self._router.complete(decision.booking)
                        yield chunk
        except WORTH_RETRYING:
            raise  # the booking ends where the failure is counted
        except BaseException:  # closed or cancelled: the load is gone from the worker
            self._router.complete(decision.booking)
            raise

    def _learn(self, decision: Decision, reply: worker_pb2.RunReply, sent: float) -> None:
        """Tell the router what the first token took and what the worker found."""
        account = CacheAccount.from_proto(reply.cache)
        actual = Actual(
            hit_tokens=account.cached_tokens,
            ttft_ms=(time.monotonic() - sent) * 1_000,
            queue_ms=reply.queue_ms,
            load_ms=reply.load_ms,
            by_tier=account.by_tier,
        )
        self._router.first_token(decision.booking, actual)

    def _chunk(self, running: Running, worker: str, reply: worker_pb2.RunReply) -> Chunk | None:
        """Return what one message of the worker adds; None when it adds nothing."""
        tokens = array("I", reply.tokens)
        if reply.HasField("cache") and running.cache is None:
            running.cache = CacheAccount.from_proto(reply.cache)
            self._count_cache(running.cache)
        # A reply may end before any token: its end is what its caller waited for, then.
        first = bool(tokens or reply.finish_reason) and not running.output
        running.output.extend(tokens)
        if first:
            running.ttft_ms = (time.monotonic() - running.arrived) * 1_000
            cached = running.cache is not None and running.cache.cached_tokens > 0
            label = "yes" if cached else "no"
            self._metrics.ttft_seconds.labels(cached=label).observe(running.ttft_ms / 1_000)
        text, stopped = running.matcher.push(running.detokeniser.push(tokens) if tokens else "")
        if stopped or reply.finish_reason:
            reason = "stop" if stopped else reply.finish_reason
            return self._last(running, worker, reason, text, reply, stopped=stopped, first=first)
        if not tokens:
            return None
        return self._plain(running, worker, text, reply, first=first)

    def _plain(
        self, running: Running, worker: str, text: str, reply: worker_pb2.RunReply | None,
        *, first: bool, finish_reason: str = "",
    ) -> Chunk:  # fmt: skip
        return Chunk(
            text=text,
            tokens=tuple(array("I", reply.tokens)) if reply is not None else (),
            chances=_chances(reply) if reply is not None else (),
            cache=running.cache if first or finish_reason else None,
            ttft_ms=running.ttft_ms if first or finish_reason else 0.0,
            worker=worker,
            output_tokens=len(running.output),
            retries=running.retries,
            finish_reason=finish_reason,
        )

    def _last(
        self, running: Running, worker: str, reason: str, text: str = "",
        reply: worker_pb2.RunReply | None = None, *, stopped: bool, first: bool = False,
    ) -> Chunk:  # fmt: skip
        """Return the last chunk: with what was held back, unless a stop string ended the text."""
        if not stopped:
            rest, stopped_now = running.matcher.push(running.detokeniser.finish())
            text += rest
            if stopped_now:
                reason = "stop"
            else:
                text += running.matcher.finish()
        return self._plain(running, worker, text, reply, first=first, finish_reason=reason)

    def _count_cache(self, cache: CacheAccount) -> None:
        for tier, tokens in cache.by_tier.items():
            self._metrics.cached_tokens.labels(tier=tier.name.lower()).inc(tokens)
        self._metrics.misses.labels(reason=cache.miss_reason.name.lower()).inc()

    def _observe_pace(self, running: Running) -> None:
        """Record the time per token after the first, where there was more than one."""
        after_first = len(running.output) - 1
        if after_first > 0:
            spent = time.monotonic() - running.arrived - running.ttft_ms / 1_000
            self._metrics.tpot_seconds.observe(spent / after_first)


def _chances(reply: worker_pb2.RunReply) -> tuple[TokenChance, ...]:
    """Return the log-probabilities in a worker's message."""
    return tuple(
        TokenChance(
            token=entry.token_ids[0],
            logprob=entry.logprobs[0],
            top=tuple(zip(entry.token_ids, entry.logprobs, strict=True)),
        )
        for entry in reply.logprobs
        if entry.token_ids
    )
