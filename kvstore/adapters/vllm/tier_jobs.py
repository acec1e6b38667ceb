"""Lookups, loads and stores of vLLM's chunks on threads, without a package of vLLM's.

vLLM asks in its scheduler and must never wait there. A lookup's first answer is "ask again"; all
keys of a step go to the node as one question, and the next step has the verdicts. Whatever
happens, a job has a result: vLLM keeps its memory until then.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from kvstore.adapters.opaque import Block, OpaqueBlocks, adapter_metrics, load_scattered
from kvstore.adapters.vllm.tier_events import TierEvents, Told
from kvstore.adapters.vllm.tier_settings import tier_name

_LOG: Final = logging.getLogger(__name__)
MAX_JOBS: Final = 1_024
"""Jobs that may wait for a thread; later ones fail at once, and the engine computes."""
MAX_ASKED: Final = 1 << 16
"""Keys in one question; later ones of a step are misses."""


class Done(NamedTuple):
    """What became of one job."""

    job: int
    keys: tuple[bytes, ...]
    """Those whose bytes are whole."""
    whole: bool
    """Whether these are all."""
    seconds: float
    moved_bytes: int


class TierJobs:
    """Over the blocks of one engine. Everything returns at once but `drain` and `close`."""

    def __init__(
        self, blocks: OpaqueBlocks, *, threads: int, events: TierEvents | None = None
    ) -> None:
        """`events` hears which chunks were stored; None: nobody wants to know."""
        self._blocks = blocks
        self._events = events
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="kvstore-tier")
        # Questions overtake copies: a request waits for its verdict, and nobody for a store.
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="kvstore-tier-ask")
        self._lock = threading.Condition()
        self._verdicts: dict[str, dict[bytes, bool | None]] = {}
        self._asked: list[tuple[str, bytes]] = []
        self._done: list[Done] = []
        self._running = 0
        self._questions = 0
        self.refused = 0
        """Jobs and keys that were not taken because too many wait."""

    def verdict(self, request: str, key: bytes) -> bool | None:
        """Say whether a chunk is there; None: not known yet, ask in the next step."""
        with self._lock:
            known = self._verdicts.setdefault(request, {})
            if key in known:
                return known[key]
            if len(self._asked) >= MAX_ASKED:
                self._refuse()
                known[key] = False
                return False
            known[key] = None
            self._asked.append((request, key))
            return None

    def ask(self) -> None:
        """Send what was asked since the last time as one question."""
        with self._lock:
            asked, self._asked = self._asked, []
            if not asked:
                return
            self._questions += 1
        self._asking.submit(self._answer, asked)

    def forget(self, request: str) -> None:
        """Drop a request's verdicts: it has ended."""
        with self._lock:
            self._verdicts.pop(request, None)

    def store(self, job: int, keys: Sequence[bytes], chunks: Sequence[Block]) -> None:
        """Store chunks from memory that stays as it is until the job is done."""
        names = [tier_name(key) for key in keys]

        def work() -> list[bool]:
            done = self._blocks.store(names, chunks)
            if self._events is not None:
                self._events.stored([key for key, here in zip(keys, done, strict=True) if here])
            return done

        self._submit(job, keys, work)

    def told(self) -> list[Told]:
        """Return which chunks the node holds now and which no longer, since the last time."""
        return self._events.take() if self._events is not None else []

    def load(self, job: int, request: str, keys: Sequence[bytes], chunks: Sequence[Block]) -> None:
        """Load chunks into memory; those that failed are misses for the request from then on."""
        names = [tier_name(key) for key in keys]

        def work() -> list[bool]:
            done = load_scattered(self._blocks, names, chunks)
            lost = [key for key, here in zip(keys, done, strict=True) if not here]
            with self._lock:
                if (known := self._verdicts.get(request)) is not None:
                    known.update(dict.fromkeys(lost, False))
            return done

        self._submit(job, keys, work)

    def finished(self) -> list[Done]:
        """Return what was done since the last time."""
        with self._lock:
            done, self._done = self._done, []
            return done

    def pending(self) -> bool:
        """Say whether anything is under way whose end has to be noticed."""
        with self._lock:
            return bool(self._running or self._questions or self._asked or self._done)

    def drain(self) -> None:
        """Wait until no job touches the engine's memory; each has the client's deadlines."""
        with self._lock:
            self._lock.wait_for(lambda: not self._running)

    def close(self) -> None:
        """Wait for what runs and end the session. Harmless when repeated."""
        self._asking.shutdown(wait=True, cancel_futures=True)
        self._threads.shutdown(wait=True)
        if self._events is not None:
            self._events.close()
        self._blocks.close()

    def _refuse(self) -> None:
        self.refused += 1
        metrics = adapter_metrics()
        metrics.refused.labels("vllm-tier").inc()

    def _answer(self, asked: Sequence[tuple[str, bytes]]) -> None:
        held = [False] * len(asked)
        try:
            held = self._blocks.held([tier_name(key) for _, key in asked])
        except Exception:  # task boundary: nobody looks at what this thread raises
            _failed("lookup", len(asked))
        finally:  # a key without a verdict would be asked for ever
            with self._lock:
                self._questions -= 1
                for (request, key), here in zip(asked, held, strict=True):
                    if (known := self._verdicts.get(request)) is not None:
                        known[key] = here

    def _submit(self, job: int, keys: Sequence[bytes], work: Callable[[], list[bool]]) -> None:
        with self._lock:
            if self._running >= MAX_JOBS:
                self._refuse()
                self._done.append(Done(job, (), False, 0.0, 0))
                return
            self._running += 1
        self._threads.submit(self._run, job, keys, work)

    def _run(self, job: int, keys: Sequence[bytes], work: Callable[[], list[bool]]) -> None:
        started, done = time.perf_counter(), [False] * len(keys)
        try:
            done = work()
        except Exception:  # task boundary: vLLM waits for the result
            _failed("copy", len(keys))
        whole = tuple(key for key, here in zip(keys, done, strict=True) if here)
        moved = len(whole) * self._blocks.payload_bytes
        seconds = time.perf_counter() - started
        with self._lock:
            self._done.append(Done(job, whole, all(done), seconds, moved))
            self._running -= 1
            self._lock.notify_all()


def _failed(call: str, chunks: int) -> None:
    """Log and count the exception at hand: it ends here."""
    _LOG.exception("a %s of %d chunks failed", call, chunks)
    metrics = adapter_metrics()
    metrics.failures.labels("vllm-tier", call).inc()
