"""The bulk port over loopback: the contract, and and sides that are dead, hung, slow or lying."""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import pytest
import xxhash

from kvstore.core.errors import BadInput, Refused
from kvstore.core.outcomes import Outcome
from kvstore.service.tickets import TicketBook
from kvstore.testing.contracts import TransportContract
from kvstore.transport.base import Ticket
from kvstore.transport.bulk import BulkTransport, Verify
from kvstore.transport.bulk_server import BulkServer
from kvstore.transport.bulk_wire import REQUEST_BYTES, Operation, Request
from tests.patience import PATIENCE_S

STALL_MS = 200
BLOCK = 8_192


class Buffers:
    """A passage over plain memory."""

    def __init__(self, blocks: Sequence[bytearray]) -> None:
        self.blocks = blocks
        self.lengths = [len(block) for block in blocks]
        self.wanted = True
        self.accepted: list[int] = []
        self.ended = 0

    def view(self, index: int) -> memoryview:
        return memoryview(self.blocks[index])

    def digest(self, block: memoryview) -> bytes:
        return xxhash.xxh3_128_digest(block)

    def accept(self, index: int, block_sum: bytes) -> Outcome:
        assert block_sum == xxhash.xxh3_128_digest(self.blocks[index])
        if not self.wanted:
            return Outcome.REFUSED
        self.accepted.append(index)
        return Outcome.HIT

    def done(self) -> None:
        self.ended += 1


class Holder:
    """A bulk port with its book."""

    def __init__(self) -> None:
        self.book = TicketBook(ttl_ms=5_000)
        self.server = BulkServer(self._redeem, stall_ms=STALL_MS)
        self.address = ""

    def _redeem(self, token: bytes, operation: Operation, host: str) -> Any:
        return self.book.redeem(token, operation, host, now_ms=time.monotonic() * 1_000)

    def ticket(
        self, operation: Operation, passage: Buffers, *, host: str = "127.0.0.1", age_ms: int = 0
    ) -> Ticket:
        now_ms = time.monotonic() * 1_000 - age_ms
        token = self.book.issue(operation, passage, session=1, host=host, now_ms=now_ms)
        return Ticket(token, self.address, self.book.ttl_ms)


@pytest.fixture
async def holder() -> AsyncIterator[Holder]:
    made = Holder()
    made.address = await made.server.start("127.0.0.1", 0)
    yield made
    await made.server.stop()


@pytest.fixture
async def transport() -> AsyncIterator[BulkTransport]:
    made = BulkTransport()
    yield made
    await made.close()


class TestBulkKeepsTheContract(TransportContract):
    @pytest.fixture(autouse=True)
    def _holder(self, holder: Holder) -> None:
        self.holder = holder

    async def open(self) -> BulkTransport:
        return BulkTransport()

    async def offer(self, blocks: Sequence[bytes], *, expired: bool = False) -> Ticket:
        movement = Buffers([bytearray(block) for block in blocks])
        return self.holder.ticket(Operation.FETCH, movement, age_ms=10_000 if expired else 0)

    async def want(self, sizes: Sequence[int]) -> tuple[Ticket, Sequence[memoryview]]:
        movement = Buffers([bytearray(size) for size in sizes])
        views = [memoryview(block) for block in movement.blocks]
        return self.holder.ticket(Operation.SEND, movement), views


async def fetch(
    transport: BulkTransport,
    ticket: Ticket,
    count: int = 1,
    stall_ms: int = STALL_MS,
    verify: Verify | None = None,
) -> tuple[list[Outcome], list[bytearray]]:
    into = [bytearray(BLOCK) for _ in range(count)]
    views = [memoryview(view) for view in into]
    async with asyncio.timeout(PATIENCE_S):
        fetched = await transport.fetch(ticket, views, stall_deadline_ms=stall_ms, verify=verify)
    return fetched, into


async def test_many_tickets_move_side_by_side(holder: Holder, transport: BulkTransport) -> None:
    movements = [Buffers([bytearray([n]) * BLOCK for _ in range(3)]) for n in range(20)]
    tickets = [holder.ticket(Operation.FETCH, movement) for movement in movements]
    fetched = await asyncio.gather(*(fetch(transport, ticket, 3) for ticket in tickets))
    for movement, (outcomes, into) in zip(movements, fetched, strict=True):
        assert outcomes == [Outcome.HIT] * 3
        assert into == movement.blocks
    await asyncio.sleep(0)
    assert len(holder.book) == 0


async def test_bytes_that_are_not_the_wanted_ones_are_corrupt(
    holder: Holder, transport: BulkTransport
) -> None:
    blocks = [bytearray([n]) * BLOCK for n in range(3)]
    ticket = holder.ticket(Operation.FETCH, Buffers(blocks))
    outcomes, _ = await fetch(transport, ticket, 3, verify=lambda index, view: view[0] != 1)
    assert outcomes == [Outcome.HIT, Outcome.CORRUPT, Outcome.HIT]


async def test_blocks_not_wanted_any_more_are_refused(
    holder: Holder, transport: BulkTransport
) -> None:
    movement = Buffers([bytearray(BLOCK)])
    movement.wanted = False
    ticket = holder.ticket(Operation.SEND, movement)
    source = [memoryview(b"\1" * BLOCK)]
    outcomes = await transport.send(ticket, source, stall_deadline_ms=STALL_MS)
    assert outcomes == [Outcome.REFUSED]


async def test_a_ticket_of_another_host_is_refused_and_used_up(
    holder: Holder, transport: BulkTransport
) -> None:
    movement = Buffers([bytearray(BLOCK)])
    ticket = holder.ticket(Operation.FETCH, movement, host="192.0.2.1")
    assert (await fetch(transport, ticket))[0] == [Outcome.REFUSED]
    assert movement.ended == 1
    assert len(holder.book) == 0


@pytest.mark.parametrize("sizes", [[BLOCK // 2], [BLOCK, BLOCK]])
async def test_blocks_of_other_lengths_are_not_moved(
    holder: Holder, transport: BulkTransport, sizes: list[int]
) -> None:
    movement = Buffers([bytearray(b"\1" * size) for size in sizes])
    outcomes, into = await fetch(transport, holder.ticket(Operation.FETCH, movement))
    assert Outcome.HIT not in outcomes
    assert not any(into[0])
    sending = Buffers([bytearray(size) for size in sizes])
    source = [memoryview(b"\1" * BLOCK)]
    ticket = holder.ticket(Operation.SEND, sending)
    assert await transport.send(ticket, source, stall_deadline_ms=STALL_MS) == [Outcome.REFUSED]
    assert not any(map(any, sending.blocks))


@pytest.mark.parametrize(
    "frame", [b"GET / HTTP/1.1\r\n" + bytes(60), b"KVB1\1"], ids=["http", "short"]
)
async def test_strangers_are_dropped_and_the_port_goes_on(
    holder: Holder, transport: BulkTransport, frame: bytes
) -> None:
    host, port = holder.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(frame)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await reader.readexactly(1)  # closed, by the stall deadline where the frame is short
    writer.close()
    assert holder.server.ended["bad_request"] + holder.server.ended["stalled"] == 1
    ticket = holder.ticket(Operation.FETCH, Buffers([bytearray(b"\1" * BLOCK)]))
    assert (await fetch(transport, ticket))[0] == [Outcome.HIT]


async def test_bytes_that_fail_their_sum_are_not_accepted(holder: Holder) -> None:
    movement = Buffers([bytearray(BLOCK)])
    ticket = holder.ticket(Operation.SEND, movement)
    host, port = holder.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(Request(Operation.SEND, ticket.token, 1).encode() + struct.pack("<I", BLOCK))
    writer.write(b"\1" * BLOCK + bytes(16))
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read(-1)
    writer.close()
    assert answer[-1] == Outcome.CORRUPT
    assert not movement.accepted


async def test_a_reader_that_hangs_lets_the_blocks_go_after_one_deadline(holder: Holder) -> None:
    movement = Buffers([bytearray(32 << 20)])
    ticket = holder.ticket(Operation.FETCH, movement)
    host, port = holder.address.split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(Request(Operation.FETCH, ticket.token, 1).encode())
        async with asyncio.timeout(PATIENCE_S):
            while not holder.server.ended:  # noqa: ASYNC110 - the server has no event
                await asyncio.sleep(0.01)
    assert holder.server.ended["stalled"] == 1
    assert movement.ended == 1


async def test_stopping_ends_what_is_in_flight(transport: BulkTransport) -> None:
    holder = Holder()
    holder.address = await holder.server.start("127.0.0.1", 0)
    movement = Buffers([bytearray(32 << 20)])
    ticket = holder.ticket(Operation.FETCH, movement)
    host, port = holder.address.split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(Request(Operation.FETCH, ticket.token, 1).encode())
        while len(holder.book):  # noqa: ASYNC110 - the book has no event
            await asyncio.sleep(0.01)
        async with asyncio.timeout(PATIENCE_S):
            await holder.server.stop()
    assert movement.ended == 1


# -- holders that are not honest or not there -----------------------------------------------

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]
GRANTED = struct.pack("<4sBII", b"KVB1", 1, 1, BLOCK)


async def _hung(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(-1)


async def _gone_in_the_middle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GRANTED + bytes(100))


async def _drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GRANTED)
    while not reader.at_eof():
        writer.write(b"\1")
        await writer.drain()
        await asyncio.sleep(STALL_MS / 4_000)


async def _babbles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\xff" * 1_000)


@pytest.mark.parametrize(
    ("talk", "outcome"),
    [
        (_hung, Outcome.LATE),
        (_gone_in_the_middle, Outcome.LATE),
        (_drips, Outcome.LATE),
        (_babbles, Outcome.LATE),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
async def test_a_bad_holder_is_an_outcome(
    transport: BulkTransport, talk: Talk, outcome: Outcome
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readexactly(REQUEST_BYTES)
            await talk(reader, writer)
        except ConnectionError:
            pass  # the client has had enough
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    outcomes, _ = await fetch(transport, Ticket(bytes(32), f"127.0.0.1:{port}", 1_000))
    assert outcomes == [outcome]
    server.close()


async def test_a_dead_holder_is_late(transport: BulkTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    outcomes, _ = await fetch(transport, Ticket(bytes(32), f"127.0.0.1:{port}", 1_000))
    assert outcomes == [Outcome.LATE]


async def test_a_cancelled_fetch_leaves_the_buffers_alone(transport: BulkTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ticket = Ticket(bytes(32), f"127.0.0.1:{listener.getsockname()[1]}", 1_000)
        fetching = asyncio.create_task(fetch(transport, ticket, stall_ms=60_000))
        accepted, _ = await asyncio.to_thread(listener.accept)
        with accepted:
            fetching.cancel()
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(asyncio.CancelledError):
                    await fetching


async def test_bad_addresses_name_the_input(transport: BulkTransport) -> None:
    for address in ("nowhere", ":1", "h:0", "h:70000"):
        with pytest.raises(BadInput, match="bulk address"):
            await fetch(transport, Ticket(bytes(32), address, 1_000))


# -- the book -------------------------------------------------------------------------------


def test_the_book_is_bounded_and_lets_go_of_what_expires() -> None:
    book = TicketBook(ttl_ms=100, limit=2)
    movements = [Buffers([bytearray(1)]) for _ in range(3)]
    for movement in movements[:2]:
        book.issue(Operation.FETCH, movement, session=1, host="h", now_ms=0)
    with pytest.raises(Refused):
        book.issue(Operation.FETCH, movements[2], session=1, host="h", now_ms=99)
    book.issue(Operation.FETCH, movements[2], session=1, host="h", now_ms=100)
    assert [movement.ended for movement in movements] == [1, 1, 0]
    assert len(book) == 1


def test_the_tickets_of_a_session_end_with_it() -> None:
    book = TicketBook()
    mine, other = Buffers([bytearray(1)]), Buffers([bytearray(1)])
    token = book.issue(Operation.SEND, mine, session=1, host="h", now_ms=0)
    book.issue(Operation.SEND, other, session=2, host="h", now_ms=0)
    assert book.close(1) == 1
    assert book.redeem(token, Operation.SEND, "h", now_ms=1) is None
    assert (mine.ended, other.ended) == (1, 0)
