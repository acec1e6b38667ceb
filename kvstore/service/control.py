"""What keeper and node say to each other over their socket pair (SOCK_SEQPACKET, JSON).

    keeper → node   sessions [[number, token, client, closed], …]   live ones, at start
                    start                                            that was all: go
                    opened number token client | closed number | exited number
                    ping n
    node → keeper   ready listen metrics incarnation
                    writers_done number                              closed, nothing reserved
                    pong n

`closed`: the session's socket ended. `exited`: every process of it ended, or the node has said
`writers_done`, so nobody writes any more. Both ends trust each other; the end of the socket is
the end of the other.
"""

import json
import socket
from collections import deque
from typing import Any, Final

from kvstore.core.errors import Unreachable

MAX_CONTROL_BYTES: Final = 32 << 10
SESSIONS_PER_MESSAGE: Final = 32
MAX_QUEUED: Final = 65_536
"""Messages waiting for the other end; beyond it the other end hangs and is to be replaced."""

Message = dict[str, Any]


class Control:
    """One end. Sending never blocks: what does not fit the socket waits in a queue."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._queue: deque[bytes] = deque()

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._sock.fileno()

    def send(self, operation: str, **fields: Any) -> bool:
        """Send or queue a message; returns whether something is queued now.

        Raises `Unreachable` when the other end is gone or hangs with a full queue.
        """
        if len(self._queue) >= MAX_QUEUED:
            raise Unreachable("the other end of the control socket reads nothing")
        encoded = json.dumps({"op": operation, **fields}, separators=(",", ":")).encode()
        assert len(encoded) <= MAX_CONTROL_BYTES
        self._queue.append(encoded)
        return self.flush()

    def flush(self) -> bool:
        """Send what is queued as far as the socket takes it; returns whether some is left."""
        while self._queue:
            try:
                self._sock.send(self._queue[0])
            except BlockingIOError:
                return True
            except OSError as error:
                raise Unreachable(f"control socket: {error}") from error
            self._queue.popleft()
        return False

    def receive(self) -> Message | None:
        """Return the next message, or None when there is none now.

        Raises `Unreachable` at the end of the other end.
        """
        try:
            raw = self._sock.recv(MAX_CONTROL_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise Unreachable(f"control socket: {error}") from error
        if not raw:
            raise Unreachable("the other end of the control socket is gone")
        message: Message = json.loads(raw)
        return message

    def close(self) -> None:
        """Close this end."""
        self._sock.close()


def control_pair() -> tuple[socket.socket, socket.socket]:
    """Return (keeper's end, node's end)."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
