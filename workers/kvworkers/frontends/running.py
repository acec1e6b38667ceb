"""A request on its way through a frontend, and the chunks that it becomes."""

import time
from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

from kvstore.observe.tracing import Span
from kvstore.rpc.v1 import worker_pb2
from kvworkers.frontends.fleet import Offer
from kvworkers.frontends.generation import CacheAccount, Chunk, Generation, chances_of
from kvworkers.frontends.ledger import Entry
from kvworkers.frontends.text import Decode, Detokeniser, StopMatcher


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
    span: Span = field(default_factory=Span)
    entry: Entry | None = None
    """Its line in the ledger, once it runs."""
    retries: int = 0
    ttft_ms: float = 0.0
    cache: CacheAccount | None = None
    prefer: frozenset[str] = frozenset()
    """Workers to be asked first: who has just computed its prompt, or is to take over."""
    computed_by: str = ""
    """Who computed the prompt, once its first token is out."""
    on_placed: Callable[[str], None] | None = None
    """Told which worker is to compute the prompt, unless another one is to go on then."""
    handed: bool = False
    """Whether one gave the first token only, and none of those that may go on a token yet."""
    handed_at: float = 0.0
    """When that token came, in `time.monotonic()` seconds; 0: nobody is waited for."""

    def siblings(self, count: int, decode: Decode) -> "list[Running]":
        """Return `count` replies to this prompt, itself the first. Before any of them runs."""
        if count == 1:
            return [self]
        others = [
            replace(
                self,
                request=self.request.sibling(number),
                detokeniser=Detokeniser(decode),
                matcher=StopMatcher(self.request.stop),
                output=array("I"),
                span=Span(),
            )
            for number in range(1, count)
        ]
        self.request = self.request.sibling(0)
        return [self, *others]

    @property
    def warms(self) -> bool:
        """Whether it only brings its prompt into the caches."""
        return self.request.sampling.max_tokens == 0

    @property
    def left_s(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def hand_over(self, takers: Collection[str]) -> None:
        """Let one of `takers` go on; whoever is best if they cannot."""
        self.handed, self.prefer = True, frozenset(takers)

    def taken_over(self) -> None:
        """Take note that another worker has given a token."""
        self.handed, self.prefer, self.handed_at = False, frozenset(), 0.0

    def asked(self, share_domain: str, *, first_only: bool) -> worker_pb2.RunRequest:
        """Return what a worker is asked: all that is left, or one token for another to go on."""
        request, wanted = self.request, self.max_tokens - len(self.output)
        return worker_pb2.RunRequest(
            request_id=request.request_id,
            tokens=(self.prompt + self.output).tobytes(),
            sampling=request.sampling.to_proto(
                1 if first_only else wanted,
                request.shape.grammar if request.shape is not None else "",
            ),
            reply_tokens=len(self.output),
            share_domain=share_domain,
            no_store=request.no_store,
            kind=request.kind,
            no_read=request.no_read,
            cache_salt=request.cache_salt,
            deadline_ms=max(1, int(self.left_s * 1_000)),
            priority=request.priority,
            hand_over=first_only,
            siblings="" if self.output else request.siblings,
        )

    def facts(self) -> dict[str, Any]:
        """Return what a trace says of a request at its beginning, as `Tracing.begin` takes it."""
        return {
            "parent": self.request.traceparent,
            "age_s": time.monotonic() - self.arrived,
            "request": self.request.request_id,
            "model": self.offer.model,
            "prompt_tokens": len(self.prompt),
        }

    def piece(
        self, worker: str, text: str, reply: worker_pb2.RunReply | None,
        *, first: bool, finish_reason: str = "",
    ) -> Chunk:  # fmt: skip
        """Return a chunk of this text and what a worker's message adds."""
        return Chunk(
            text=text,
            tokens=tuple(array("I", reply.tokens)) if reply is not None else (),
            chances=chances_of(reply) if reply is not None else (),
            cache=self.cache if first or finish_reason else None,
            ttft_ms=self.ttft_ms if first or finish_reason else 0.0,
            worker=worker,
            prefill_worker=self.computed_by if first or finish_reason else "",
            output_tokens=len(self.output),
            retries=self.retries,
            finish_reason=finish_reason,
        )

    def last(
        self, worker: str, reason: str, text: str = "",
        reply: worker_pb2.RunReply | None = None, *, stopped: bool, first: bool = False,
    ) -> Chunk:  # fmt: skip
        """Return the last chunk: with what was held back, unless a stop string ended the text."""
        if not stopped:
            rest, stopped_now = self.matcher.push(self.detokeniser.finish())
            text += rest
            if stopped_now:
                reason = "stop"
            else:
                text += self.matcher.finish()
        return self.piece(worker, text, reply, first=first, finish_reason=reason)
