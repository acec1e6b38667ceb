"""Keeps a client's session alive and clean: rejoins after a keeper's death, sweeps lost slots."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

from kvstore.client import checks
from kvstore.client.config import ClientConfig
from kvstore.client.replies import SlotRef
from kvstore.client.reservations import Reservations
from kvstore.client.session import Access, Session
from kvstore.core.errors import KvStoreError, Unreachable
from kvstore.core.limits import MAX_NAMES_PER_CALL
from kvstore.observe.metrics import ClientMetrics
from kvstore.rpc.v1 import cache_pb2

_SWEEP_ROUNDS: Final = 3
"""Looks after a lost answer. Two find a stray; the third is for a node that was slow to reserve."""


class Link:
    """The current session, and the background tasks that look after it."""

    def __init__(
        self, access: Access, config: ClientConfig, metrics: ClientMetrics, session: Session
    ) -> None:
        self.access = access
        self.config = config
        self.metrics = metrics
        self.session = session
        self.closed = False
        self.on_new_session: Callable[[], None] | None = None
        self._reservations = Reservations()
        self._longest_reserve_ms = config.call_ms
        self._sweep_rounds = 0
        self._sweeper: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._leases: list[int] = []
        self._releaser: asyncio.Task[None] | None = None
        self._writing: set[asyncio.Future[None]] = set()
        self._adopt(session)

    @property
    def connected(self) -> bool:
        """Whether the keeper holds our session now."""
        return not (self.session.lost or self.closed)

    async def call(self, session: Session, method: str, request: Any, deadline_ms: int) -> Any:
        """Make a call on `session`; a failure is counted and raised as one of our errors."""
        try:
            if self.closed:
                raise Unreachable("the client is closed")
            return await session.call(method, request, deadline_ms=deadline_ms)
        except KvStoreError as error:
            self.metrics.failures.labels(method, type(error).__name__).inc()
            raise

    async def acquire(
        self, session: Session, request: cache_pb2.AcquireRequest, deadline_ms: int
    ) -> cache_pb2.AcquireReply:
        """Make an Acquire that may reserve, as `reserving`."""
        reply: cache_pb2.AcquireReply = await self.reserving(
            session, "Acquire", request, deadline_ms
        )
        return reply

    async def reserving(self, session: Session, method: str, request: Any, deadline_ms: int) -> Any:
        """Make a call that may reserve: slots of a lost answer are found and given back."""
        self._longest_reserve_ms = max(self._longest_reserve_ms, deadline_ms)
        openings = session.openings
        try:
            reply = await self.call(session, method, request, deadline_ms)
        except (Unreachable, asyncio.CancelledError):
            self.sweep_soon()
            raise
        if session.openings != openings:  # it was repeated: the first try may have reserved too
            self.sweep_soon()
        return reply

    def hold(self, session: Session, slots: Iterable[SlotRef]) -> None:
        """Note that a caller of ours has these reserved slots."""
        if session is self.session:
            self._reservations.hold(slots)

    def let_go(self, slots: Iterable[SlotRef]) -> None:
        """Note that a caller settled these slots, whatever came of it."""
        self._reservations.settle(slots)

    def sweep_soon(self) -> None:
        """Look for reserved slots that nobody holds, a few times from now."""
        self._sweep_rounds = _SWEEP_ROUNDS
        if (self._sweeper is None or self._sweeper.done()) and not self.closed:
            self._sweeper = self.spawn(self._sweep(self.session))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` in the background until the client is closed."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def note_writing(self, work: "asyncio.Future[None]") -> None:
        """Note a thread that writes reserved slots: they are its own until it ends."""
        self._writing.add(work)
        work.add_done_callback(self._writing.discard)

    def release_soon(self, lease: int) -> None:
        """Release a lease without waiting; several together where they come quickly.

        Raises `BadInput` for what is no lease, at once: it would spoil the call of all the others.
        """
        checks.lease(lease)
        if not lease or self.closed:
            return
        self._leases.append(lease)
        if self._releaser is None or self._releaser.done():
            self._releaser = self.spawn(self._release_all())

    async def _release_all(self) -> None:
        """Release what was collected; a failure is counted, for a lease runs out by itself."""
        while self._leases:
            leases = self._leases[:MAX_NAMES_PER_CALL]
            del self._leases[:MAX_NAMES_PER_CALL]
            session = self.session
            request = cache_pb2.SettleRequest(
                root=session.root, release=leases, incarnation=session.incarnation
            )
            with contextlib.suppress(KvStoreError):
                await self.call(session, "Settle", request, self.config.call_ms)

    async def close(self) -> None:
        """End the background tasks and the session."""
        if self.closed:
            return
        self.closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        writing = list(self._writing)
        if writing:  # slots given back now would be written under their next owner
            await asyncio.wait(writing, timeout=self.config.transfer_ms / 1000)
        await self.session.close(writers_gone=all(work.done() for work in writing))

    def _adopt(self, session: Session) -> None:
        self.session = session
        self._reservations = Reservations()
        self._sweep_rounds = 0
        session.watch(self._on_lost)

    def _on_lost(self, session: Session) -> None:
        if session is self.session and not self.closed:
            self.spawn(self._rejoin(session))

    async def _rejoin(self, old: Session) -> None:
        """Make a new session as soon as there is a keeper again."""
        await old.close()
        pause_s = self.config.rejoin_first_ms / 1000
        while not self.closed:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self.config.rejoin_most_ms / 1000)
            try:
                session = await Session.start(
                    self.access,
                    # Views of the old arena stay valid: its pages go when the last one is dropped.
                    arena_number=old.arena.number + 1,
                    deadline_ms=self.config.connect_ms,
                )
            except KvStoreError as error:
                self.metrics.failures.labels("Rejoin", type(error).__name__).inc()
                continue
            self.metrics.sessions.labels("keeper_restarted").inc()
            self._adopt(session)
            if self.on_new_session is not None:
                self.on_new_session()
            return

    async def _sweep(self, session: Session) -> None:
        """Abort what stands reserved for us and is in nobody's hands, at two looks in a row."""
        ping = cache_pb2.SettleRequest(root=session.root)
        while self._sweep_rounds > 0 and not session.lost:
            # No call in flight at one look is in flight at the next.
            await asyncio.sleep((self.config.sweep_ms + self._longest_reserve_ms) / 1000)
            reservations = self._reservations
            try:
                await self.call(session, "Settle", ping, self.config.call_ms)
                reserved = await asyncio.to_thread(session.arena.reserved_by, session.grant.session)
                strays = reservations.look(reserved)
                if strays:
                    request = cache_pb2.SettleRequest(root=session.root)
                    request.abort.slots.extend(slot for slot, _ in strays)
                    request.abort.generations.extend(generation for _, generation in strays)
                    await self.call(session, "Settle", request, self.config.call_ms)
                    self.metrics.strays.inc(len(strays))
            except KvStoreError:  # counted; a node that does not answer is asked again
                continue
            self._sweep_rounds -= 1
