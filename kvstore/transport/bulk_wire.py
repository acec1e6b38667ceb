"""Frames of the bulk port, and blocking moves of bytes that notice when nothing moves.

    fetch   client ── request ───────────────▶ server
            client ◀── reply, lengths, block* ── server
    send    client ── request, lengths ──────▶ server
            client ◀── reply ──────────────── server
            client ── (block, sum)* ─────────▶ server
            client ◀── one outcome per block ── server

What is fetched is held against the sums that came with the lease, which the holder made when it
sealed the block: they guard its memory, the wire and everything between, and nobody hashes twice.
What is sent has no lease, so its sum travels behind it. Numbers are little-endian.
"""

import socket
import struct
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from kvstore.core.errors import BadInput, TooLarge
from kvstore.core.limits import MAX_BLOCK_BYTES

MAGIC: Final = b"KVB1"
TOKEN_BYTES: Final = 32
MAX_BLOCKS: Final = 1_024
"""Blocks on one ticket: 2 GiB of 2 MiB blocks; longer batches take more tickets."""
MIN_BYTES_PER_S: Final = 4 << 20
"""Slower than this is a stall too: else a byte now and then would hold a slot for ever."""
_GATHER: Final = 512
"""Parts of one call: the kernel takes 1,024."""
_REQUEST: Final = struct.Struct("<4sB32sI")
_REPLY: Final = struct.Struct("<4sBI")
SUM_BYTES: Final = 16
Digest = Callable[[memoryview], bytes]
"""A block's bytes, padding included, to their 16-byte sum; called in the thread that moves them."""
REQUEST_BYTES: Final = _REQUEST.size


class Operation(IntEnum):
    """What a request asks for."""

    FETCH = 1
    SEND = 2


class Request(NamedTuple):
    """The first frame of a connection."""

    operation: Operation
    token: bytes
    blocks: int

    def encode(self) -> bytes:
        """Return the frame."""
        return _REQUEST.pack(MAGIC, self.operation, self.token, self.blocks)


def decode_request(frame: bytes | bytearray) -> Request:
    """Parse a request; raises `BadInput` for another protocol, `TooLarge` for too many blocks."""
    magic, operation, token, blocks = _REQUEST.unpack(frame)
    if magic != MAGIC or operation not in (Operation.FETCH, Operation.SEND):
        raise BadInput("the first bytes are no request of the bulk port")
    if not 0 < blocks <= MAX_BLOCKS:
        raise TooLarge(f"{blocks} blocks on one ticket; 1 to {MAX_BLOCKS} allowed")
    return Request(Operation(operation), token, blocks)


class Mover:
    """Moves bytes over a blocking socket under a stall deadline. Used from one thread.

    Every method raises `TimeoutError` when nothing moved for the deadline or the whole is slower
    than `MIN_BYTES_PER_S`, and `ConnectionError` when the other side is gone.
    """

    def __init__(self, sock: socket.socket, *, stall_s: float) -> None:
        assert stall_s > 0
        self._sock = sock
        self._stall_s = stall_s
        self._ends = time.monotonic() + stall_s
        # The kernel's own timeouts: with Python's the socket would not block, and every piece that
        # the kernel has at hand would be a call, a poll and two fights for the interpreter.
        sock.setblocking(True)
        timeval = struct.pack("@ll", int(stall_s), int(stall_s % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def _allow(self, length: int) -> None:
        # At least a stall deadline from now on: the other side may have been hashing or queueing.
        self._ends = time.monotonic() + self._stall_s + length / MIN_BYTES_PER_S

    def _check(self) -> None:
        if time.monotonic() > self._ends:
            raise TimeoutError(f"slower than {MIN_BYTES_PER_S} bytes a second")

    def put(self, *parts: bytes | memoryview) -> None:
        """Send all parts, gathered; never through `sendfile`, which would queue pages."""
        views = [memoryview(part) for part in parts if len(part)]
        self._allow(sum(map(len, views)))
        while views:
            try:
                sent = self._sock.sendmsg(views[:_GATHER])
            except BlockingIOError:
                raise TimeoutError("nothing was taken for a stall deadline") from None
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if views:
                views[0] = views[0][sent:]
                self._check()

    def take(self, into: memoryview) -> None:
        """Fill `into`."""
        self._allow(len(into))
        at = 0
        while at < len(into):
            try:
                moved = self._sock.recv_into(into[at:], 0, socket.MSG_WAITALL)
            except BlockingIOError:
                raise TimeoutError("nothing came for a stall deadline") from None
            if not moved:
                raise ConnectionResetError("the other side closed in the middle of a frame")
            at += moved
            self._check()

    def take_bytes(self, length: int) -> bytes:
        """Return the next `length` bytes; the caller has bounded `length`."""
        frame = bytearray(length)
        self.take(memoryview(frame))
        return bytes(frame)

    def put_summed(self, block: memoryview, digest: "Digest") -> None:
        """Send a block and its sum."""
        self.put(block, digest(block))

    def take_summed(self, into: memoryview, digest: "Digest") -> bytes | None:
        """Receive a block; return its sum, None when other bytes were summed."""
        self.take(into)
        found = digest(into)
        return found if self.take_bytes(SUM_BYTES) == found else None

    def put_reply(self, *, granted: bool, lengths: Sequence[int] = ()) -> None:
        """Answer a request; the lengths of a fetch's blocks travel with it."""
        packed = struct.pack(f"<{len(lengths)}I", *lengths)
        self.put(_REPLY.pack(MAGIC, granted, len(lengths)), packed)

    def take_reply(self, lengths: Sequence[int] = ()) -> bool:
        """Return whether the ticket was honoured.

        Raises `BadInput` when the holder is about to send other lengths than were asked for: not
        one byte of a block has been received then.
        """
        magic, granted, count = _REPLY.unpack(self.take_bytes(_REPLY.size))
        if magic != MAGIC:
            raise BadInput("the holder's answer is no reply of the bulk port")
        if not granted:
            return False
        if count != len(lengths) or self.take_lengths(count) != tuple(lengths):
            raise BadInput(f"the holder sends other blocks than the {len(lengths)} asked for")
        return True

    def put_lengths(self, lengths: Sequence[int]) -> None:
        """Say how long each block will be."""
        self.put(struct.pack(f"<{len(lengths)}I", *lengths))

    def take_lengths(self, count: int) -> tuple[int, ...]:
        """Return `count` lengths; raises `TooLarge` for one over `MAX_BLOCK_BYTES`."""
        assert count <= MAX_BLOCKS
        lengths: tuple[int, ...] = struct.unpack(f"<{count}I", self.take_bytes(4 * count))
        if max(lengths, default=0) > MAX_BLOCK_BYTES:
            raise TooLarge(f"a block of {max(lengths)} bytes; {MAX_BLOCK_BYTES} allowed")
        return lengths
