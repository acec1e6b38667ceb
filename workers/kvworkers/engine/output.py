"""What a request says back, and the bounded stream that carries it."""

import asyncio
from dataclasses import dataclass, field

from kvstore.core.errors import KvStoreError
from kvworkers.engine.sampling import Logprobs, Sampled
from kvworkers.engine.sequence import CacheUse, FinishReason


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """What is known once the prompt is computed; comes with the first output."""

    cache: CacheUse
    ttft_ms: float
    """From arrival to the first token."""
    queue_ms: float
    """From arrival to the first step that computed for it, loading left out."""
    load_ms: float
    """Spent on the cache node and on copies from the arena."""


@dataclass(slots=True)
class Output:
    """Everything since the last output. A stop token or end of sequence is not among `tokens`."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    first: FirstTokens | None = None
    finish: FinishReason | None = None
    """With the last output."""


class OutputStream:
    """From the engine to one caller; both live on one event loop.

    A slow caller makes nobody wait: what was not taken yet is gathered into one output, which
    the request's `max_tokens` bounds.
    """

    def __init__(self) -> None:
        self._pending = Output()
        self._error: KvStoreError | None = None
        self._changed = asyncio.Event()

    def push(self, sampled: Sampled) -> None:
        """Add one token."""
        self._pending.tokens.append(sampled.token)
        if sampled.logprobs is not None:
            self._pending.logprobs.append(sampled.logprobs)
        self._changed.set()

    def begin(self, first: FirstTokens) -> None:
        """Say how the prompt was served; before the first token."""
        self._pending.first = first

    def finish(self, reason: FinishReason) -> None:
        """End the stream after what is pending."""
        self._pending.finish = reason
        self._changed.set()

    def fail(self, error: KvStoreError) -> None:
        """End the stream with an error."""
        self._error = error
        self._changed.set()

    async def take(self) -> Output:
        """Return what came since the last call, waiting for something; raises what `fail` got.

        The wait is bounded by the request's own deadline and by the engine's steps, both of
        which end the stream.
        """
        await self._changed.wait()
        self._changed.clear()
        if self._error is not None:
            raise self._error
        taken, self._pending = self._pending, Output()
        return taken
