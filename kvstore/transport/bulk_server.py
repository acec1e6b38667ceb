"""The holder's end of the bulk port.

The event loop accepts, reads the request and redeems the ticket; a bounded pool of threads moves
the bytes. A connection serves one ticket. Strangers hold a descriptor for one stall deadline,
never a thread.
"""

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, Protocol, TypeVar

from kvstore.core.errors import BadInput
from kvstore.core.outcomes import Outcome
from kvstore.transport.bulk_wire import (
    REQUEST_BYTES,
    Mover,
    Operation,
    Request,
    decode_request,
)

MAX_CONNECTIONS: Final = 256
"""Open at once; one more is closed unanswered."""
_THREADS: Final = 8
_BACKLOG: Final = 128
_T = TypeVar("_T")


class Passage(Protocol):
    """The blocks that a redeemed ticket lets through. Called on the event loop but for `digest`."""

    @property
    def lengths(self) -> Sequence[int]:
        """Bytes of each block in the ticket's order."""
        ...

    def view(self, index: int) -> memoryview:
        """Return where block `index` is read from, or will be written to, until `done`."""
        ...

    def digest(self, block: memoryview) -> bytes:
        """Return the 16-byte sum of a block that was sent here; called in a thread."""
        ...

    def accept(self, index: int, block_sum: bytes) -> Outcome:
        """Note that block `index` has arrived whole; REFUSED when it is not wanted any more."""
        ...

    def done(self) -> None:
        """Nothing of this passage is used any more."""
        ...


Redeem = Callable[[bytes, Operation, str], Passage | None]
"""(token, operation, host of the caller) to what it allows; None for any ticket not valid now."""


class BulkServer:
    """A listening bulk port. `ended` counts connections by how they ended."""

    def __init__(self, redeem: Redeem, *, stall_ms: int = 2_000) -> None:
        assert stall_ms > 0
        self._redeem = redeem
        self._stall_s = stall_ms / 1_000
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="bulk-port")
        self._serving: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self.ended: Counter[str] = Counter()

    async def start(self, host: str, port: int) -> str:
        """Listen; return the address bound. Raises `OSError` when it is taken."""
        assert self._listener is None, "started twice"
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        listener.setblocking(False)
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener), name="bulk accept")
        bound = listener.getsockname()[1]
        return f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"

    async def stop(self) -> None:
        """Stop listening and end what is in flight; returns when no block is used any more."""
        tasks = [*self._serving, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        await asyncio.to_thread(self._threads.shutdown)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(listener)
            except OSError:
                # Out of descriptors, or a caller that left: the port has to outlive both.
                self.ended["accept_failed"] += 1
                await asyncio.sleep(self._stall_s / 10)
                continue
            if len(self._serving) >= MAX_CONNECTIONS:
                self.ended["too_many"] += 1
                sock.close()
                continue
            task = asyncio.create_task(self._serve(sock, str(peer[0])), name="bulk connection")
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def _serve(self, sock: socket.socket, host: str) -> None:
        how = "cancelled"
        try:
            sock.setblocking(False)
            request = await self._request(sock)
            how = await self._answer(sock, request, host)
        except TimeoutError:
            how = "stalled"
        except OSError:
            how = "gone"
        except BadInput:
            how = "bad_request"
        finally:
            sock.close()
            self.ended[how] += 1

    async def _request(self, sock: socket.socket) -> Request:
        frame = bytearray()
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._stall_s):
            while len(frame) < REQUEST_BYTES:
                part = await loop.sock_recv(sock, REQUEST_BYTES - len(frame))
                if not part:
                    raise ConnectionResetError("closed before a request")
                frame += part
        return decode_request(frame)

    async def _answer(self, sock: socket.socket, request: Request, host: str) -> str:
        passage = self._redeem(request.token, request.operation, host)
        try:
            if passage is None or len(passage.lengths) != request.blocks:
                await self._work(sock, lambda: self._refuse(sock, request))
                return "refused"
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if request.operation is Operation.FETCH:
                return await self._give(sock, passage)
            return await self._get(sock, passage)
        finally:
            if passage is not None:
                passage.done()

    def _refuse(self, sock: socket.socket, request: Request) -> None:
        mover = Mover(sock, stall_s=self._stall_s)
        if request.operation is Operation.SEND:
            # Unread bytes would make the kernel reset the connection and lose the answer.
            mover.take_lengths(request.blocks)
        mover.put_reply(granted=False)

    async def _give(self, sock: socket.socket, passage: Passage) -> str:
        lengths = passage.lengths
        sources = [passage.view(index) for index in range(len(lengths))]

        def work() -> None:
            mover = Mover(sock, stall_s=self._stall_s)
            mover.put_reply(granted=True, lengths=lengths)
            mover.put(*sources)

        await self._work(sock, work)
        return "served"

    async def _get(self, sock: socket.socket, passage: Passage) -> str:
        """Receive each block where it belongs; what came whole is accepted, one by one."""
        mover = Mover(sock, stall_s=self._stall_s)
        lengths = tuple(passage.lengths)
        announced = await self._work(sock, lambda: mover.take_lengths(len(lengths)))
        if announced != lengths:
            await self._work(sock, lambda: mover.put_reply(granted=False))
            return "bad_request"
        await self._work(sock, lambda: mover.put_reply(granted=True))
        outcomes = bytearray()
        for index in range(len(lengths)):
            take = partial(mover.take_summed, passage.view(index), passage.digest)
            found = await self._work(sock, take)
            outcomes.append(Outcome.CORRUPT if found is None else passage.accept(index, found))
        await self._work(sock, lambda: mover.put(bytes(outcomes)))
        return "taken" if set(outcomes) == {Outcome.HIT} else "taken_in_part"

    async def _work(self, sock: socket.socket, work: Callable[[], _T]) -> _T:
        """Run `work` in a thread; at a cancellation wait until the thread has let go."""
        working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            while not working.done():  # cancelled twice is cancelled once
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([working])
            raise
