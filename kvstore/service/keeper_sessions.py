"""The keeper's sessions: handshakes, numbers, and who of each session still lives."""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.errors import BadInput, KvStoreError, Refused, Unreachable
from kvstore.service.child import SessionRow
from kvstore.service.config import KeeperConfig
from kvstore.service.sessions import FIRST_REMOTE_SESSION
from kvstore.transport.session_socket import (
    TOKEN_BYTES,
    Grant,
    Hello,
    peer_credentials,
    receive_hello,
    send_grant,
    send_refusal,
)

HANDSHAKES_MAX: Final = 64
HELLO_DEADLINE_S: Final = 5.0
_log = logging.getLogger("kvstore.keeper")


@dataclass(slots=True)
class _Kept:
    number: int
    token: bytes
    client: str
    sock: socket.socket | None
    """None once the session is closed."""
    pidfds: set[int] = field(default_factory=set)


class KeptSessions:
    """Sessions that live, and closed ones with reserved slots that a process may still write."""

    def __init__(self, config: KeeperConfig, arena_fd: int, tell: Callable[..., None]) -> None:
        self._config = config
        self._arena_fd = arena_fd
        self._tell = tell
        self._kept: dict[int, _Kept] = {}
        self._last = 0
        self._handshakes: set[asyncio.Task[None]] = set()
        self.incarnation = 0

    def rows(self) -> list[SessionRow]:
        """Return what a new node has to know."""
        return [(k.number, k.token.hex(), k.client, k.sock is None) for k in self._kept.values()]

    async def accept(self, listener: socket.socket) -> None:
        """Take connections until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors: those of ended sessions come back
                _log.error("cannot accept a session: %s", error)
                await asyncio.sleep(0.1)
                continue
            if len(self._handshakes) >= HANDSHAKES_MAX:
                sock.close()
                continue
            task = asyncio.create_task(self._handshake(sock))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    def close(self) -> None:
        """Close every session; their sockets end for the clients."""
        for task in self._handshakes:
            task.cancel()
        for kept in list(self._kept.values()):
            self._end(kept)
            for pidfd in list(kept.pidfds):
                self._exited(kept, pidfd)

    def writers_done(self, number: int) -> None:
        """Forget a closed session that has no reserved slot: none of its processes matters now.

        Otherwise one long-lived process that connects again and again would use up all sessions.
        """
        kept = self._kept.get(number)
        if kept is not None and kept.sock is None:
            for pidfd in list(kept.pidfds):
                self._exited(kept, pidfd)

    async def _handshake(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            await _readable(sock, HELLO_DEADLINE_S)
            # Read first: closing with the hello unread would reset the connection and with it
            # the refusal.
            hello = receive_hello(sock)
            pid, uid, _ = peer_credentials(sock)
            if uid != os.getuid():
                raise Refused(f"user {uid} may not map this arena")
            self._grant(sock, hello, pid)
        except KvStoreError as error:
            _log.info("session refused: %s", error)
            retry_after_ms = error.retry_after_ms if isinstance(error, Refused) else 0
            with contextlib.suppress(OSError):
                send_refusal(sock, str(error), retry_after_ms=retry_after_ms)
            sock.close()
        except OSError as error:
            _log.info("session lost during the handshake: %s", error)
            sock.close()
        except BaseException:
            sock.close()
            raise

    def _grant(self, sock: socket.socket, hello: Hello, pid: int) -> None:
        if len(self._kept) >= self._config.max_sessions:
            raise Refused(f"{self._config.max_sessions} sessions are open", retry_after_ms=1_000)
        pidfds = _open_pids({pid, *hello.pids})
        kept = _Kept(
            self._next_number(), secrets.token_bytes(TOKEN_BYTES), hello.client, sock, pidfds
        )
        self._kept[kept.number] = kept
        loop = asyncio.get_running_loop()
        for pidfd in pidfds:
            loop.add_reader(pidfd, self._exited, kept, pidfd)
        loop.add_reader(sock, self._heard, kept)
        # The node first: when the client's first call arrives there, this message has too.
        self._tell("opened", number=kept.number, token=kept.token.hex(), client=kept.client)
        grant = Grant(
            kept.number, kept.token, self._config.rpc, self._config.name, self.incarnation
        )
        try:
            send_grant(sock, grant, self._arena_fd)
        except OSError:
            self._end(kept)

    def _next_number(self) -> int:
        """Return the number after the last one that is not in use: reused as late as possible."""
        while True:
            self._last = self._last % (FIRST_REMOTE_SESSION - 1) + 1  # the rest is the node's own
            if self._last not in self._kept:
                return self._last

    def _heard(self, kept: _Kept) -> None:
        """End a session whose socket became readable: its end, or words nobody should say."""
        self._end(kept)

    def _end(self, kept: _Kept) -> None:
        if kept.sock is None:
            return
        asyncio.get_running_loop().remove_reader(kept.sock)
        kept.sock.close()
        kept.sock = None
        self._tell("closed", number=kept.number)
        self._forget_if_over(kept)

    def _exited(self, kept: _Kept, pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        kept.pidfds.discard(pidfd)
        self._end(kept)
        self._forget_if_over(kept)

    def _forget_if_over(self, kept: _Kept) -> None:
        if kept.sock is None and not kept.pidfds and kept.number in self._kept:
            del self._kept[kept.number]
            self._tell("exited", number=kept.number)


def _open_pids(pids: set[int]) -> set[int]:
    """Return a pidfd for each of our user's processes; raises `BadInput` for any other."""
    opened: set[int] = set()
    try:
        for pid in pids:
            opened.add(os.pidfd_open(pid))
            # After the pidfd: the number cannot pass to another process any more.
            if os.stat(f"/proc/{pid}").st_uid != os.getuid():
                raise BadInput(f"process {pid} belongs to another user")
    except OSError as error:
        _close_all(opened)
        raise BadInput(f"a process of the session: {error.strerror}") from error
    except BaseException:
        _close_all(opened)
        raise
    return opened


def _close_all(descriptors: set[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


async def _readable(sock: socket.socket, deadline_s: float) -> None:
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    loop.add_reader(sock, arrived.set)
    try:
        async with asyncio.timeout(deadline_s):
            await arrived.wait()
    except TimeoutError:
        raise Unreachable("no hello in time") from None
    finally:
        loop.remove_reader(sock)
