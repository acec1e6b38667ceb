"""Frames over a Unix socket between two ranks of one host, descriptors beside them."""

import os
import select
import socket
import struct
import threading
from contextlib import suppress
from typing import Final

from kvstore.core.errors import BadInput, Unreachable
from kvworkers.ranks.messages import LENGTHS, Frame, check_lengths, pack, unpack

_TIMEVAL: Final = struct.Struct("ll")
_BUFFER_BYTES: Final = 4 << 20
"""What may lie in the socket while a rank computes: so telling it something does not wait."""


class Channel:
    """One end. Any thread may send; one receives. Raises `Unreachable` once the other is gone."""

    def __init__(self, sock: socket.socket, *, deadline_s: float) -> None:
        """`deadline_s`: how long the other may leave what is sent to it unread."""
        self._sock = sock
        self._sending = threading.Lock()
        whole, rest = divmod(int(deadline_s * 1e6), 1_000_000)
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(whole, rest))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)

    @classmethod
    def connect(cls, path: str, *, deadline_s: float) -> "Channel":
        """Connect to a rank that listens on `path`."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(deadline_s)
            sock.connect(path)
            return cls(sock, deadline_s=deadline_s)
        except OSError as error:
            sock.close()
            raise Unreachable(f"no rank listens on {path}: {error.strerror or error}") from error

    def send(self, frame: Frame, descriptor: int | None = None) -> None:
        """Send a frame, whole before any other, and a copy of `descriptor` with it."""
        data = memoryview(pack(frame))
        try:
            with self._sending:
                if descriptor is not None:
                    sent = socket.send_fds(self._sock, [data], [descriptor])
                    data = data[sent:]
                self._sock.sendall(data)
        except OSError as error:
            raise Unreachable(f"a rank took no {frame.kind}: {error.strerror or error}") from error

    def receive(self, *, deadline_s: float | None = None) -> tuple[Frame, int | None]:
        """Return the next frame, and the descriptor that came with it: the caller's to close.

        Waits for its begin for `deadline_s`, or for ever.
        """
        try:
            if deadline_s is not None and not select.select([self._sock], [], [], deadline_s)[0]:
                raise Unreachable(f"a rank said nothing for {deadline_s:g} s")
            first, descriptors, _, _ = socket.recv_fds(self._sock, LENGTHS.size, 1)
            lengths = first + self._exactly(LENGTHS.size - len(first)) if first else b""
            if not lengths:
                raise Unreachable("a rank has ended")
            head_bytes, array_bytes = LENGTHS.unpack(lengths)
            check_lengths(head_bytes, array_bytes)
            frame = unpack(self._exactly(head_bytes), self._exactly(array_bytes))
        except (OSError, ValueError) as error:
            raise Unreachable(f"a rank is gone: {error}") from error
        return frame, descriptors[0] if descriptors else None

    def expect(self, kind: str, *, deadline_s: float) -> Frame:
        """Return the next frame, which has to be of `kind`.

        Raises `Unreachable` with the rank's own words where it has failed.
        """
        frame, descriptor = self.receive(deadline_s=deadline_s)
        if descriptor is not None:
            os.close(descriptor)
        if frame.kind == "failed":
            raise Unreachable(str(frame.facts.get("why")))
        if frame.kind != kind:
            raise BadInput(f"a rank said {frame.kind} where {kind} was due")
        return frame

    def close(self) -> None:
        """End the connection; who waits in `receive` is told."""
        with suppress(OSError):  # the other end was first
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _exactly(self, count: int) -> bytes:
        parts = bytearray(count)
        at, view = 0, memoryview(parts)
        while at < count:
            got = self._sock.recv_into(view[at:])
            if not got:
                raise Unreachable("a rank has ended in the middle of a frame")
            at += got
        return bytes(parts)
