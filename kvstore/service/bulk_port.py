"""The node's bulk port: tickets over slots of the arena, for sessions and nodes that do not map it.

A slot on a ticket is pinned until the ticket has ended, used or not, so nothing moves into a slot
that belongs to somebody else and nothing is read from one that was given away. Times are the
node's monotonic milliseconds.
"""

from collections.abc import Callable, Sequence
from typing import Final

from kvstore.core.errors import BadInput, Refused
from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.outcomes import Outcome
from kvstore.core.slots import SlotState
from kvstore.observe.metrics import PeerMetrics
from kvstore.service.roots import RootInfo
from kvstore.service.sessions import Session
from kvstore.service.slots import SlotTable
from kvstore.service.tickets import TicketBook
from kvstore.tiers.sums import block_sum
from kvstore.transport.base import Ticket
from kvstore.transport.bulk_server import BulkServer, Passage
from kvstore.transport.bulk_wire import Operation

NOBODY: Final = 0
"""Session number of tickets that other nodes hold."""


class BulkPort:
    """Hands out tickets and serves them."""

    def __init__(self, table: SlotTable, metrics: PeerMetrics, now_ms: Callable[[], float]) -> None:
        self._table = table
        self._metrics = metrics
        self._now_ms = now_ms
        self._book = TicketBook()
        self._server = BulkServer(self._redeem)
        self.address = ""

    async def start(self, listen: str) -> str:
        """Listen on `host:port`; return the bound address. Raises `BadInput` naming a taken one."""
        host, _, port = listen.rpartition(":")
        try:
            self.address = await self._server.start(host.strip("[]"), int(port))
        except OSError as error:
            raise BadInput(f"cannot listen on {listen} for bulk transfers: {error}") from error
        return self.address

    async def stop(self) -> None:
        """End what is in flight; returns when no slot is used any more."""
        if self.address:
            await self._server.stop()
        self._book.expire(float("inf"))

    def lend(self, slots: Sequence[int], *, session: int, host: str) -> Ticket:
        """Return a ticket to read sealed slots in order. Raises `Refused` when too many are out."""
        return self._issue(Operation.FETCH, _Reading(self._table, slots), session, host)

    def take(self, session: Session, info: RootInfo, slots: Sequence[int], *, host: str) -> Ticket:
        """Return a ticket to fill slots that a remote session has reserved, each once.

        Raises `Refused` for a slot that has been filled or stands on another ticket.
        """
        assert session.arrived is not None, "a local session writes in place"
        for slot in slots:
            if slot in session.filling or slot in session.arrived:
                raise Refused(f"slot {slot} is on a ticket already", retry_after_ms=0)
        writing = _Writing(self._table, session, info, slots)
        return self._issue(Operation.SEND, writing, session.number, host)

    def expire(self, now_ms: float) -> None:
        """End tickets whose time is over, and count what the port did."""
        self._book.expire(now_ms)
        self._metrics.tickets.set(len(self._book))
        ended, self._server.ended = self._server.ended, type(self._server.ended)()
        for how, count in ended.items():
            self._metrics.connections.labels(how).inc(count)

    def close(self, session: Session) -> None:
        """End the unused tickets of a session."""
        self._book.close(session.number)

    def _issue(
        self, operation: Operation, passage: "_Reading | _Writing", session: int, host: str
    ) -> Ticket:
        try:
            token = self._book.issue(
                operation, passage, session=session, host=host, now_ms=self._now_ms()
            )
        except BaseException:
            passage.done()
            raise
        return Ticket(token, self.address, self._book.ttl_ms)

    def _redeem(self, token: bytes, operation: Operation, host: str) -> Passage | None:
        passage = self._book.redeem(token, operation, host, now_ms=self._now_ms())
        if passage is not None:
            direction = "sent" if operation is Operation.FETCH else "received"
            self._metrics.bytes.labels(direction).inc(sum(passage.lengths))
        return passage


class _Pinned:
    """Slots that stay until `done`."""

    def __init__(self, table: SlotTable, slots: Sequence[int]) -> None:
        self._table = table
        self._slots = list(slots)
        table.pin(self._slots)
        self.lengths = [table.root_of(slot).shape.block_bytes for slot in self._slots]

    def view(self, index: int) -> memoryview:
        """Return a slot's bytes, padding included."""
        table, slot = self._table, self._slots[index]
        return table.arena.block(table.granules[slot] * GRANULE_BYTES, self.lengths[index])

    def done(self) -> None:
        """Let go of the slots."""
        slots, self._slots = self._slots, []
        self._table.unpin(slots)


class _Reading(_Pinned):
    """Sealed slots on their way out."""

    def digest(self, block: memoryview) -> bytes:
        """Nothing is ever sent here."""
        raise AssertionError("a ticket to read was used to write")

    def accept(self, index: int, block_sum: bytes) -> Outcome:
        """Nothing is ever sent here."""
        raise AssertionError("a ticket to read was used to write")


class _Writing(_Pinned):
    """Reserved slots of a remote session that are being filled."""

    def __init__(
        self, table: SlotTable, session: Session, info: RootInfo, slots: Sequence[int]
    ) -> None:
        super().__init__(table, slots)
        self._session = session
        self._shape = info.shape
        self._mine = list(slots)
        self._generations = [table.generation[slot] for slot in slots]
        session.filling.update(slots)

    def digest(self, block: memoryview) -> bytes:
        """Return the block's sum: of its payload, share by share."""
        return block_sum(block[: self._shape.payload_bytes], self._shape.shares)

    def accept(self, index: int, block_sum: bytes) -> Outcome:
        """Note that a slot holds its block, unless the session gave it up meanwhile."""
        slot, table = self._mine[index], self._table
        arrived = self._session.arrived
        current = table.generation[slot] == self._generations[index]
        if not current or table.state[slot] != SlotState.RESERVED or arrived is None:
            return Outcome.REFUSED
        view = self.view(index)
        # What an earlier tenant left in the padding goes no further.
        view[self._shape.payload_bytes :] = bytes(len(view) - self._shape.payload_bytes)
        arrived[slot] = block_sum
        return Outcome.HIT

    def done(self) -> None:
        """Let go of the slots."""
        self._session.filling.difference_update(self._mine)
        super().done()
