"""The client's end of the bulk port: a `Transport` over TCP, one connection per ticket.

Bytes move in threads with blocking sockets: `recv_into` and the sum both release the GIL, so the
event loop stays free and several tickets move side by side. A call returns only when its thread has
let go of the caller's buffers, also when it was cancelled: nothing is ever written to them later.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import xxhash

from kvstore.core.errors import BadInput
from kvstore.core.outcomes import Outcome
from kvstore.transport.base import Ticket
from kvstore.transport.bulk_wire import MAX_BLOCKS, Digest, Mover, Operation, Request

DEFAULT_STREAMS: Final = 4
"""Connections that move at once; further calls queue for one."""
Verify = Callable[[int, memoryview], bool]
"""(index, bytes of the block, padding included) to whether they are the block's; in the thread."""


class BulkTransport:
    """Fetches from and sends to bulk ports."""

    def __init__(self, *, streams: int = DEFAULT_STREAMS) -> None:
        assert streams > 0
        self._threads = ThreadPoolExecutor(streams, thread_name_prefix="bulk")
        self._turns = asyncio.Semaphore(streams)
        self._open: set[socket.socket] = set()
        self._closed = False

    async def fetch(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        *,
        stall_deadline_ms: int,
        verify: Verify | None = None,
    ) -> list[Outcome]:
        """Fill `into` in the ticket's order; HIT says that the bytes arrived and `verify` held."""
        work = partial(_fetch, verify=verify)
        return await self._move(work, Operation.FETCH, ticket, into, stall_deadline_ms / 1_000)

    async def send(
        self,
        ticket: Ticket,
        source: Sequence[memoryview],
        *,
        stall_deadline_ms: int,
        digest: Digest = xxhash.xxh3_128_digest,
    ) -> list[Outcome]:
        """Write `source` in the ticket's order; HIT says that the holder verified and took it.

        `digest` has to be what the holder expects of these blocks.
        """
        work = partial(_send, digest=digest)
        return await self._move(work, Operation.SEND, ticket, source, stall_deadline_ms / 1_000)

    async def close(self) -> None:
        """Close connections; calls in flight end with LATE, later ones with REFUSED."""
        self._closed = True
        for sock in self._open:
            _end(sock)
        await asyncio.to_thread(self._threads.shutdown)

    async def _move(
        self,
        work: Callable[[Mover, Sequence[memoryview], list[Outcome]], None],
        operation: Operation,
        ticket: Ticket,
        blocks: Sequence[memoryview],
        stall_s: float,
    ) -> list[Outcome]:
        if not blocks:
            return []
        if len(blocks) > MAX_BLOCKS:
            raise BadInput(f"{len(blocks)} blocks on one ticket; {MAX_BLOCKS} allowed")
        address = _parse(ticket.address)
        outcomes = [Outcome.LATE] * len(blocks)
        request = Request(operation, ticket.token, len(blocks))
        async with self._turns:
            if self._closed:
                return [Outcome.REFUSED] * len(blocks)
            sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
            self._open.add(sock)

            def run() -> None:
                # What did not arrive stays LATE: a dead, hung or confused holder is no error.
                with contextlib.suppress(OSError, BadInput):
                    mover = Mover(sock, stall_s=stall_s)
                    sock.connect(address)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    mover.put(request.encode())
                    work(mover, blocks, outcomes)

            moving = asyncio.get_running_loop().run_in_executor(self._threads, run)
            try:
                await asyncio.shield(moving)
            except asyncio.CancelledError:
                _end(sock)
                # The thread notices at once; the buffers are the caller's again only then.
                while not moving.done():  # cancelled twice is cancelled once
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([moving])
                raise
            finally:
                self._open.discard(sock)
                sock.close()
        return outcomes


def _fetch(
    mover: Mover, into: Sequence[memoryview], outcomes: list[Outcome], *, verify: Verify | None
) -> None:
    if not mover.take_reply([len(view) for view in into]):
        outcomes[:] = [Outcome.REFUSED] * len(into)
        return
    for index, view in enumerate(into):
        mover.take(view)
        whole = verify is None or verify(index, view)
        outcomes[index] = Outcome.HIT if whole else Outcome.CORRUPT


def _send(
    mover: Mover, source: Sequence[memoryview], outcomes: list[Outcome], *, digest: Digest
) -> None:
    mover.put_lengths([len(view) for view in source])
    if not mover.take_reply():
        outcomes[:] = [Outcome.REFUSED] * len(source)
        return
    for view in source:
        mover.put_summed(view, digest)
    answered = mover.take_bytes(len(source))
    known = {int(outcome): outcome for outcome in Outcome}
    outcomes[:] = [known.get(value, Outcome.LATE) for value in answered]


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected yet, or gone already
        sock.shutdown(socket.SHUT_RDWR)


def _parse(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) <= 65_535:
        raise BadInput(f"bulk address {address!r:.80} is not host:port")
    return host.strip("[]"), int(port)
