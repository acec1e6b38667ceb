"""Handshakes and ends of sessions, with real sockets and processes but no node."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.core.errors import Refused, Unreachable
from kvstore.service import keeper_sessions as module
from kvstore.service.config import KeeperConfig
from kvstore.service.keeper_sessions import KeptSessions
from kvstore.service.sessions import FIRST_REMOTE_SESSION
from kvstore.testing.node import new_run_dir
from kvstore.transport.session_socket import Grant, Hello, connect_session
from tests.patience import PATIENCE_MS, PATIENCE_S

Told = list[tuple[str, int]]


class Keeping:
    """Sessions on a listening socket, and what the node was told."""

    def __init__(self, run_dir: Path, max_sessions: int) -> None:
        self.told: Told = []
        self.heard = asyncio.Event()
        config = KeeperConfig(
            run_dir=run_dir, name="n", arena_bytes=4096, max_sessions=max_sessions
        )
        self.sessions = KeptSessions(config, os.open(os.devnull, os.O_RDONLY), self.tell)
        self.path = str(config.keeper_socket)

    def tell(self, operation: str, **fields: Any) -> None:
        self.told.append((operation, fields["number"]))
        self.heard.set()

    async def connect(self, *pids: int) -> tuple[Grant, socket.socket]:
        hello = Hello("test", pids or (os.getpid(),))
        grant, fd, sock = await asyncio.to_thread(
            connect_session, self.path, hello, deadline_ms=PATIENCE_MS
        )
        os.close(fd)
        return grant, sock

    async def until(self, *told: tuple[str, int]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not set(told) <= set(self.told):
                self.heard.clear()
                await self.heard.wait()


@asynccontextmanager
async def keeping(max_sessions: int = 8) -> AsyncIterator[Keeping]:
    run_dir = new_run_dir()
    kept = Keeping(run_dir, max_sessions)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.setblocking(False)
    listener.bind(kept.path)
    listener.listen(8)
    accepting = asyncio.create_task(kept.sessions.accept(listener))
    try:
        yield kept
    finally:
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        kept.sessions.close()
        listener.close()
        os.close(kept.sessions._arena_fd)
        os.unlink(kept.path)
        run_dir.rmdir()


async def test_the_node_hears_of_a_session_before_its_client_does() -> None:
    async with keeping() as kept:
        kept.sessions.incarnation = 5
        grant, sock = await kept.connect()
        assert kept.told == [("opened", 1)]
        assert (grant.session, grant.node, grant.incarnation) == (1, "n", 5)
        assert kept.sessions.rows() == [(1, grant.token.hex(), "test", False)]
        sock.close()
        await kept.until(("closed", 1))
        assert ("exited", 1) not in kept.told, "this process lives and may still write"
        assert kept.sessions.rows() == [(1, grant.token.hex(), "test", True)]
    assert kept.told[-1] == ("exited", 1)


async def test_the_end_of_one_process_closes_and_of_all_frees() -> None:
    sleeper = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE
    )
    try:
        async with keeping() as kept:
            _, sock = await kept.connect(sleeper.pid)
            sleeper.kill()
            await kept.until(("closed", 1))
            assert await asyncio.to_thread(sock.recv, 1) == b""
            assert ("exited", 1) not in kept.told
            sock.close()
    finally:
        await asyncio.wait_for(sleeper.communicate(), PATIENCE_S)


async def test_a_closed_session_without_writers_is_forgotten() -> None:
    async with keeping(max_sessions=1) as kept:
        kept.sessions.writers_done(77)
        for number in (1, 2, 3):
            _, sock = await kept.connect()
            kept.sessions.writers_done(number)  # it is open: nothing happens
            assert ("exited", number) not in kept.told
            sock.close()
            await kept.until(("closed", number))
            kept.sessions.writers_done(number)
            assert kept.told[-1] == ("exited", number)
        assert kept.sessions.rows() == []


async def test_numbers_come_back_as_late_as_possible() -> None:
    async with keeping() as kept:
        (first, one), (second, two) = await kept.connect(), await kept.connect()
        one.close()
        await kept.until(("closed", 1))
        third, three = await kept.connect()
        assert [first.session, second.session, third.session] == [1, 2, 3]
        kept.sessions._last = FIRST_REMOTE_SESSION - 1
        fourth, four = await kept.connect()
        assert fourth.session == 4, "1 to 3 are in use or may still be written under"
        for sock in (two, three, four):
            sock.close()


async def test_full_and_unknown_processes_are_refused() -> None:
    async with keeping(max_sessions=1) as kept:
        with pytest.raises(Refused, match="a process of the session"):
            await kept.connect(1 << 22)
        _, sock = await kept.connect()
        with pytest.raises(Refused, match="1 sessions are open"):
            await kept.connect()
        sock.close()


async def test_a_silent_connection_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELLO_DEADLINE_S", 0.05)
    async with keeping() as kept:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(kept.path)
        sock.settimeout(PATIENCE_S)
        assert b"no hello in time" in await asyncio.to_thread(sock.recv, 4096)
        sock.close()


async def test_handshakes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKES_MAX", 0)
    async with keeping() as kept:
        with pytest.raises(Unreachable):
            await kept.connect()
        assert kept.told == []
