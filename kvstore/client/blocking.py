"""The client for code without an event loop: the same calls, on a loop in a thread of its own."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import TimeoutError as LateError
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from kvstore.client import checks
from kvstore.client.aio import AsyncClient
from kvstore.client.config import ClientConfig
from kvstore.client.copies import Payload, WriteGate
from kvstore.client.replies import Acquired, Lookup, Names, NodeStats, Settled, SlotRef
from kvstore.core.errors import Unreachable
from kvstore.core.names import Namespace, Root
from kvstore.core.outcomes import Outcome, SettleOutcome
from kvstore.observe.metrics import ClientMetrics
from kvstore.rpc.credentials import Credentials

_Result = TypeVar("_Result")
_GRACE_S: Final = 1.0
"""Beyond a call's own deadline: only a loop that is stuck needs it."""


class _LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kvstore-client", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, _Result], *, deadline_ms: int) -> _Result:
        """Run `work` and wait for it; raises `Unreachable` when the loop does not come back."""
        if not self.alive:
            work.close()
            raise Unreachable("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(deadline_ms / 1000 + _GRACE_S)
        except LateError as error:
            future.cancel()
            raise Unreachable(f"no answer within {deadline_ms} ms") from error

    def soon(self, work: Callable[[], object]) -> None:
        """Have the loop call `work`; nothing where it has ended."""
        if self.alive:
            # The loop may be closed in between.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(work)

    def stop(self) -> None:
        """End the loop and the thread."""
        if self.alive:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_GRACE_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


class Client:
    """`AsyncClient` without `await`; safe to use from several threads at once.

    `view`, `still` and `arena` touch shared memory from the calling thread.
    """

    def __init__(self, thread: _LoopThread, inner: AsyncClient) -> None:
        """For `connect`: use that."""
        self._thread = thread
        self._inner = inner

    @classmethod
    def connect(
        cls,
        where: str | Path,
        *,
        namespace: Namespace,
        payload_bytes: int,
        shares: int,
        share_domain: str = "",
        name: str = "",
        pids: Sequence[int] = (),
        config: ClientConfig | None = None,
        metrics: ClientMetrics | None = None,
        credentials: Credentials | None = None,
    ) -> Self:
        """Open a session; see `AsyncClient.connect`."""
        config = config or ClientConfig()
        thread = _LoopThread()
        try:
            work = AsyncClient.connect(
                where,
                namespace=namespace,
                payload_bytes=payload_bytes,
                shares=shares,
                share_domain=share_domain,
                name=name,
                pids=pids,
                config=config,
                metrics=metrics,
                credentials=credentials,
            )
            return cls(thread, thread.run(work, deadline_ms=config.connect_ms))
        except BaseException:
            thread.stop()
            raise

    @property
    def connected(self) -> bool:
        """Whether the keeper holds our session now."""
        return self._inner.connected

    @property
    def root(self) -> Root:
        """The root that names are chained from."""
        return self._inner.root

    @property
    def incarnation(self) -> int:
        """Incarnation of the node when the root was last opened."""
        return self._inner.incarnation

    @property
    def lease_ms(self) -> int:
        """How long a lease lasts when it is not released."""
        return self._inner.lease_ms

    @property
    def node(self) -> str:
        """Name of the cache node."""
        return self._inner.node

    @property
    def address(self) -> str:
        """Where the node serves gRPC."""
        return self._inner.address

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in the arena, padding included."""
        return self._inner.block_bytes

    @property
    def arena(self) -> memoryview:
        """The data of the whole arena."""
        return self._inner.arena

    def on_new_session(self, notify: Callable[[], None]) -> None:
        """Call `notify`, in the client's thread, after a keeper's restart."""
        self._inner.on_new_session = lambda _: notify()

    def view(self, ref: SlotRef) -> memoryview:
        """Return a block's bytes in place; see `AsyncClient.view`."""
        return self._inner.view(ref)

    def still(self, ref: SlotRef) -> bool:
        """Say whether the slot still holds the block that it was leased for, readable."""
        return self._inner.still(ref)

    is_ready = still

    def wait_ready(self, refs: Sequence[SlotRef], *, deadline_ms: int | None = None) -> int:
        """Wait until all of `refs` are readable; return how many are, from the first."""
        limit = self._limit(deadline_ms, self._inner.config.transfer_ms)
        return self._run(self._inner.wait_ready(refs, deadline_ms=deadline_ms), limit)

    def acquire(
        self,
        names: Names,
        *,
        reserve: int = 0,
        deadline_ms: int | None = None,
        pending_ms: int | None = None,
        first_block: int = 0,
        kind: str = "",
        depth_cost: float = 0.0,
    ) -> Acquired:
        """Lease what is here and reserve for the rest; see `AsyncClient.acquire`."""
        work = self._inner.acquire(
            names,
            reserve=reserve,
            deadline_ms=deadline_ms,
            pending_ms=pending_ms,
            first_block=first_block,
            kind=kind,
            depth_cost=depth_cost,
        )
        return self._run(work, self._limit(deadline_ms, self._inner.config.call_ms))

    def prefetch(self, names: Names, *, deadline_ms: int | None = None) -> int:
        """Start moving blocks up; see `AsyncClient.prefetch`."""
        work = self._inner.prefetch(names, deadline_ms=deadline_ms)
        return self._run(work, self._inner.config.call_ms)

    def pin(self, names: Names, *, ttl_ms: int) -> int:
        """Keep blocks for a time; see `AsyncClient.pin`."""
        return self._run(self._inner.pin(names, ttl_ms=ttl_ms), self._inner.config.call_ms)

    def clear(self, *, everything: bool = False, deadline_ms: int | None = None) -> int:
        """Forget a root or everything; see `AsyncClient.clear`."""
        work = self._inner.clear(everything=everything, deadline_ms=deadline_ms)
        return self._run(work, self._limit(deadline_ms, self._inner.config.transfer_ms))

    def settle(
        self,
        *,
        commit: Iterable[SlotRef] = (),
        abort: Iterable[SlotRef] = (),
        release: Iterable[int] = (),
        kept_in_hbm: Iterable[SlotRef] = (),
        deadline_ms: int | None = None,
    ) -> Settled:
        """Commit, abort and release in one call; see `AsyncClient.settle`."""
        work = self._inner.settle(
            commit=commit,
            abort=abort,
            release=release,
            kept_in_hbm=kept_in_hbm,
            deadline_ms=deadline_ms,
        )
        return self._run(work, self._limit(deadline_ms, self._inner.config.call_ms))

    def release(self, lease: int) -> None:
        """Release a lease soon, without waiting; see `AsyncClient.release`."""
        checks.lease(lease)  # in the loop's thread nobody would hear of it
        self._thread.soon(partial(self._inner.release, lease))

    def wait(self, names: Names, *, deadline_ms: int | None = None) -> list[Outcome]:
        """Wait in the node until blocks are readable."""
        limit = self._limit(deadline_ms, self._inner.config.transfer_ms)
        work = self._inner.wait(names, deadline_ms=deadline_ms)
        return self._run(work, limit + self._inner.config.call_ms)

    def lookup(self, names: Names, *, deadline_ms: int | None = None) -> Lookup:
        """Say what is here, without a lease."""
        limit = self._limit(deadline_ms, self._inner.config.call_ms)
        return self._run(self._inner.lookup(names, deadline_ms=deadline_ms), limit)

    def stats(self, *, deadline_ms: int | None = None) -> NodeStats:
        """Return the node's sizes, hits and misses."""
        limit = self._limit(deadline_ms, self._inner.config.call_ms)
        return self._run(self._inner.stats(deadline_ms=deadline_ms), limit)

    def get(self, names: Names, *, deadline_ms: int | None = None) -> list[bytes]:
        """Return copies of the longest prefix that is here; see `AsyncClient.get`."""
        limit = self._limit(deadline_ms, self._inner.config.transfer_ms)
        return self._run(self._inner.get(names, deadline_ms=deadline_ms), 2 * limit)

    def get_into(
        self, names: Names, buffers: Sequence[memoryview], *, deadline_ms: int | None = None
    ) -> int:
        """Copy the longest prefix into buffers of yours; see `AsyncClient.get_into`."""
        limit = self._limit(deadline_ms, self._inner.config.transfer_ms)
        gate = WriteGate()
        work = self._inner.get_into(names, buffers, deadline_ms=deadline_ms, gate=gate)
        try:
            return self._run(work, 2 * limit)
        except BaseException:
            # The copying thread may be at it still, whatever the loop knows of it.
            gate.close()
            raise

    def put(
        self,
        names: Names,
        payloads: Sequence[Payload],
        *,
        first_block: int = 0,
        deadline_ms: int | None = None,
    ) -> list[SettleOutcome | None]:
        """Store blocks; see `AsyncClient.put`."""
        limit = self._limit(deadline_ms, self._inner.config.transfer_ms)
        work = self._inner.put(names, payloads, first_block=first_block, deadline_ms=deadline_ms)
        return self._run(work, 2 * limit)

    def close(self) -> None:
        """End the session and the thread. Harmless when repeated."""
        if self._thread.alive:
            config = self._inner.config
            try:
                self._run(self._inner.close(), config.connect_ms + config.transfer_ms)
            finally:
                self._thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, _Result], deadline_ms: int) -> _Result:
        return self._thread.run(work, deadline_ms=deadline_ms)

    @staticmethod
    def _limit(asked: int | None, default: int) -> int:
        return default if asked is None else asked
