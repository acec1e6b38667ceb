"""A request on its way through a frontend, and the chunks that it becomes."""

import time
from array import array
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
    prefer: str = ""
    """The worker that has just computed its prompt, to be asked first; empty: whichever is best."""

    def siblings(self, count: int, decode: Decode) -> "list[Running]":
        """Return `count` replies to this prompt, itself the first. Before any of them runs."""
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
        return [self, *others]

    @property
    def warms(self) -> bool:
        """Whether it only brings its prompt into the caches."""
        return self.request.sampling.max_tokens == 0

    @property
    def left_s(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

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
