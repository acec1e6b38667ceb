"""The one path of a request, for HTTP and gRPC alike.

    render + tokenise → name → route → Worker.Run → detokenise → chunks
                          ▲                 │ worker lost: tokens so far are kept,
                          └─────────────────┘ and the rest is asked of another one; as after the
                                              first token, where the router split the request

Nothing here decides where a request goes (the router does) or what a token is (the worker does).
"""

import time
from array import array
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Final

from kvstore.core.errors import (
    BadInput,
    Corrupt,
    KvStoreError,
    Refused,
    SessionLost,
    TooLarge,
    Unreachable,
)
from kvstore.observe.metrics import RouterMetrics
from kvstore.observe.tracing import OFF, Tracing
from kvstore.router.learning import Actual
from kvstore.router.placement import Decision
from kvstore.router.router import Router
from kvstore.rpc.v1 import worker_pb2
from kvworkers.frontends.attempt import attempt
from kvworkers.frontends.fleet import Fleet
from kvworkers.frontends.generation import CacheAccount, Chunk, FieldError, Generation
from kvworkers.frontends.grammars import ShapeChecks
from kvworkers.frontends.ledger import Ledger, outcome_of
from kvworkers.frontends.placing import Placing
from kvworkers.frontends.running import Running
from kvworkers.frontends.text import Detokeniser, StopMatcher
from kvworkers.frontends.tokenizer import ChatTokenizer

WORTH_RETRYING: Final = (Unreachable, SessionLost, Refused, Corrupt)
"""Failures that another worker, or the same one later, need not repeat."""

SERVED: Final = ("stop", "length", "cancelled")
"""Outcomes that are nobody's fault."""


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
        tracing: Tracing = OFF,
    ) -> None:
        self.tokenizer = tokenizer
        self.fleet = fleet
        self._config = config
        self.ledger = Ledger(metrics)
        self._tracing = tracing
        self._router = router
        self._metrics = metrics
        self._shapes = ShapeChecks()
        self._placing = Placing(
            router, fleet, share_domain=config.share_domain, wait_ms=config.wait_ms,
            other_wait_ms=config.other_wait_ms,
        )  # fmt: skip
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
            self.ledger.refused(outcome_of(error))
            raise
        finally:
            self._preparing -= 1

    async def _prepare(self, request: Generation) -> Running:
        arrived = time.monotonic()
        offer = await self.fleet.offered(request.model, wait_ms=self._config.wait_ms)
        if request.shape is not None:
            await self._shapes.check(request.shape)
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
            # One token is chosen even where none is wanted, and not given out: it costs nothing.
            max_tokens=min(self._config.default_max_tokens, room) if asked is None else asked or 1,
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
        with self.places(1):
            async with aclosing(self.run_placed(running)) as chunks:
                async for chunk in chunks:
                    yield chunk

    @contextmanager
    def places(self, wanted: int) -> Iterator[int]:
        """Hold that many places of those that run at once, or all that there are; yield how many.

        Raises `Refused` while fewer are free.
        """
        places = min(wanted, self._config.max_in_flight)
        if self._in_flight + places > self._config.max_in_flight:
            self.ledger.refused("Refused")
            raise Refused(f"{self._in_flight} requests are running here already", 1_000)
        self._in_flight += places
        try:
            yield places
        finally:
            self._in_flight -= places

    async def run_placed(self, running: Running) -> AsyncGenerator[Chunk, None]:
        """Do what `run` does in one of the `places` that the caller holds."""
        entry = running.entry = self.ledger.begin(
            running.request.request_id,
            domain=running.request.share_domain or self._config.share_domain,
            model=running.offer.model,
            prompt_tokens=len(running.prompt),
        )
        running.span = self._tracing.begin("request", **running.facts())
        outcome = "cancelled"
        try:
            async with aclosing(self._chunks(running)) as chunks:
                async for chunk in chunks:
                    # Counted before it is given out: nobody may come back for more.
                    outcome = chunk.finish_reason or outcome
                    yield chunk
        except KvStoreError as error:
            outcome = outcome_of(error)
            raise
        finally:
            running.span.set(outcome=outcome, output_tokens=len(running.output))
            running.span.end("" if outcome in SERVED else outcome)
            lasted_s = time.monotonic() - running.arrived
            self.ledger.end(entry, outcome, output_tokens=len(running.output), lasted_s=lasted_s)

    async def _tokenise(self, request: Generation) -> "array[int]":
        if request.messages is not None:
            return await self.tokenizer.conversation(request.messages, request.tools)
        if request.text is not None:
            return await self.tokenizer.text(request.text)
        assert request.tokens is not None, "checked when the request was made"
        limit = self.tokenizer.vocabulary
        least, most = min(request.tokens), max(request.tokens)
        if least < 0 or most >= limit:
            wrong = least if least < 0 else most
            what = f"prompt: token id {wrong} is outside the vocabulary of {limit}"
            raise FieldError(what, "prompt")
        return array("I", request.tokens)

    async def _chunks(self, running: Running) -> AsyncGenerator[Chunk, None]:
        """Ask one worker after the other until the reply is whole."""
        failed: set[str] = set()
        while True:
            traceparent = running.span.traceparent
            with self._tracing.begin("route", traceparent) as placing:
                decision = await self._placing.place(running, failed)
                placing.set(
                    worker=decision.worker, hit_tokens=decision.hit_tokens,
                    predicted_ttft_ms=decision.predicted_ttft_ms,
                )  # fmt: skip
            if running.entry is not None:
                running.entry.note(decision, running.retries)
            if running.on_placed is not None and decision.split is None:
                running.on_placed(decision.worker)
            try:
                with self._tracing.begin("attempt", traceparent, worker=decision.worker) as span:
                    chunks = self._from_worker(running, decision, span.traceparent)
                    async with aclosing(chunks):
                        async for chunk in chunks:
                            yield chunk
                            if chunk.finish_reason:
                                return
            except WORTH_RETRYING as error:
                if reason := self._ended(running):
                    # It was lost after its last token: only the end was not said.
                    self._router.complete(decision.booking, failed=True)
                    yield running.last(decision.worker, reason, stopped=False)
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
        self, running: Running, decision: Decision, traceparent: str
    ) -> AsyncGenerator[Chunk, None]:
        """Yield what one worker adds to the reply."""
        run = running.asked(self._config.share_domain, first_only=decision.split is not None)
        replies = attempt(
            self.fleet.stub(decision.worker),
            run,
            timeout_s=max(0.001, running.left_s),
            silence_ms=lambda: self._router.silence_ms(decision.worker),
            lost_after_ms=self._config.lost_after_ms,
            traceparent=traceparent,
        )
        sent = time.monotonic()
        try:
            async with aclosing(replies):
                async for reply in replies:
                    if reply.HasField("cache"):
                        self._learn(decision, reply, sent)
                    chunk = self._chunk(running, decision, reply)
                    if chunk is not None:
                        if chunk.finish_reason:
                            # Before it is given out: nobody may come back for more.
                            self._router.complete(decision.booking)
                        yield chunk
            if running.handed:
                self._router.complete(decision.booking)
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

    def _chunk(
        self, running: Running, decision: Decision, reply: worker_pb2.RunReply
    ) -> Chunk | None:
        """Return what one message of the worker adds; None when it adds nothing."""
        worker = decision.worker
        if running.warms:
            _withhold(reply)
        tokens = array("I", reply.tokens)
        if reply.HasField("cache") and running.cache is None:
            running.cache, running.computed_by = CacheAccount.from_proto(reply.cache), worker
            if running.entry is not None:
                self.ledger.found(running.entry, running.cache, worker)
        # A reply may end before any token: its end is what its caller waited for, then.
        first = bool(tokens or reply.finish_reason) and not running.output
        running.output.extend(tokens)
        reason = self._reason(running, decision, reply)
        if first:
            running.ttft_ms = (time.monotonic() - running.arrived) * 1_000
            if running.entry is not None:
                self.ledger.first_token(running.entry, running.ttft_ms)
        text, stopped = running.matcher.push(running.detokeniser.push(tokens) if tokens else "")
        if stopped or reason:
            reason = "stop" if stopped else reason
            return running.last(worker, reason, text, reply, stopped=stopped, first=first)
        if not tokens:
            return None
        return running.piece(worker, text, reply, first=first)

    def _reason(self, running: Running, decision: Decision, reply: worker_pb2.RunReply) -> str:
        """Return why a reply ends with this message; empty where it goes on.

        As after the part of the first of two workers: that ends its call, and not the reply.
        """
        now = time.monotonic()
        if running.handed_at and reply.tokens:
            self._metrics.hand_over_seconds.observe(now - running.handed_at)
            running.taken_over()
        if decision.split is None:
            return reply.finish_reason
        if reply.tokens:
            running.handed_at = now
        if reply.finish_reason == "length" and len(running.output) < running.max_tokens:
            running.hand_over(decision.split.takers)
            return ""
        return reply.finish_reason


def _withhold(reply: worker_pb2.RunReply) -> None:
    """Take out of a worker's message what was generated though nothing was wanted."""
    reply.ClearField("tokens")
    reply.ClearField("logprobs")
    if reply.finish_reason:
        reply.finish_reason = "length"
