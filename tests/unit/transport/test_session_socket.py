"""The handshake over real Unix sockets: both ends, and everything malformed."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.errors import BadInput, KvStoreError, Refused, Unreachable
from kvstore.transport.session_socket import (
    MAX_HANDSHAKE_BYTES,
    MAX_PIDS,
    Grant,
    Hello,
    connect_session,
    peer_credentials,
    receive_hello,
    send_grant,
    send_refusal,
)
from tests.patience import PATIENCE_S

GRANT = Grant(7, bytes(range(16)), "unix:/tmp/node.sock", "node-a", 3)
HELLO = Hello("tester", (os.getpid(),))
Answer = Callable[[socket.socket], None]


class OneShot:
    """A listening session socket that gives one prepared answer to one client."""

    def __init__(self, path: str, answer: Answer) -> None:
        self.hello: Hello | None = None
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            self.hello = receive_hello(connection)
            self._answer(connection)

    def close(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self._listener.close()


@pytest.fixture
def arena_fd() -> Iterator[int]:
    fd = os.memfd_create("arena", os.MFD_CLOEXEC)
    os.write(fd, b"arena bytes")
    yield fd
    os.close(fd)


def handshake(path: Path, answer: Answer) -> tuple[Grant, int, socket.socket]:
    server = OneShot(str(path), answer)
    try:
        return connect_session(str(path), HELLO, deadline_ms=2000)
    finally:
        server.close()


def test_a_session_brings_the_grant_and_the_arena(tmp_path: Path, arena_fd: int) -> None:
    path = str(tmp_path / "s")
    server = OneShot(path, lambda sock: send_grant(sock, GRANT, arena_fd))
    grant, fd, sock = connect_session(path, HELLO, deadline_ms=2000)
    server.close()
    assert grant == GRANT
    assert server.hello == HELLO
    assert os.pread(fd, 11, 0) == b"arena bytes"
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert sock.recv(1) == b"", "the keeper's end was closed, and the client sees it"
    sock.close()


def test_a_refusal_is_typed_and_says_when_to_come_back(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="64 sessions are open") as caught:
        handshake(
            tmp_path / "s", lambda s: send_refusal(s, "64 sessions are open", retry_after_ms=250)
        )
    assert caught.value.retry_after_ms == 250


def test_a_silent_keeper_costs_one_deadline(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "s"))
    listener.listen(1)
    started = time.monotonic()
    with pytest.raises(Unreachable):
        connect_session(str(tmp_path / "s"), HELLO, deadline_ms=100)
    assert 0.09 < time.monotonic() - started
    listener.close()


def test_a_full_backlog_costs_one_deadline(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(0)
    waiting = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    waiting.connect(path)
    started = time.monotonic()
    with pytest.raises(Unreachable):
        connect_session(path, HELLO, deadline_ms=100)
    assert 0.09 < time.monotonic() - started
    waiting.close()
    listener.close()


def test_no_keeper_is_unreachable_and_named(tmp_path: Path) -> None:
    path = str(tmp_path / "nobody")
    with pytest.raises(Unreachable, match="nobody"):
        connect_session(path, HELLO, deadline_ms=100)
    with pytest.raises(BadInput, match="longer than 107"):
        connect_session("/tmp/" + "x" * 120, HELLO, deadline_ms=100)


def test_a_keeper_that_hangs_up_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        handshake(tmp_path / "s", lambda s: None)


@pytest.mark.parametrize("broken", ["no descriptor", "two descriptors", "short token", "not json"])
def test_a_broken_grant_is_refused_and_leaks_nothing(
    tmp_path: Path, arena_fd: int, broken: str
) -> None:
    good = {
        "v": 1,
        "session": 1,
        "token": "00" * 16,
        "rpc": "unix:x",
        "node": "n",
        "incarnation": 1,
    }

    def answer(sock: socket.socket) -> None:
        if broken == "no descriptor":
            sock.send(json.dumps(good).encode())
        elif broken == "two descriptors":
            socket.send_fds(sock, [json.dumps(good).encode()], [arena_fd, arena_fd])
        elif broken == "short token":
            socket.send_fds(sock, [json.dumps({**good, "token": "00"}).encode()], [arena_fd])
        else:
            socket.send_fds(sock, [b"\xff\xfe"], [arena_fd])

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BadInput):
        handshake(tmp_path / "s", answer)
    assert len(os.listdir("/proc/self/fd")) == before


def say(message: bytes, descriptors: tuple[int, ...] = ()) -> Hello:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        if descriptors:
            socket.send_fds(theirs, [message], list(descriptors))
        else:
            theirs.send(message)
        return receive_hello(ours)


@pytest.mark.parametrize(
    "message",
    [
        b"\x00",
        b"[]",
        b'{"v":2,"client":"a","pids":[1]}',
        b'{"client":"a","pids":[1]}',
        b'{"v":1,"pids":[1]}',
        b'{"v":1,"client":"a","pids":[]}',
        b'{"v":1,"client":"a","pids":[true]}',
        b'{"v":1,"client":"a","pids":[-1]}',
        b'{"v":1,"client":"a","pids":[99999999999]}',
        b'{"v":1,"client":"a","pids":"1"}',
        b'{"v":1,"client":7,"pids":[1]}',
        b"[" * 4000,
        rb'{"v":1,"client":"\ud800","pids":[1]}',
        b'{"v":1,"client":"' + b"a" * 300 + b'","pids":[1]}',
        b"x" * (MAX_HANDSHAKE_BYTES + 1),
    ],
)
def test_a_malformed_hello_is_bad_input(message: bytes) -> None:
    with pytest.raises(BadInput):
        say(message)


@given(st.binary(min_size=1, max_size=200))
def test_no_message_crashes_the_keeper(message: bytes) -> None:
    with pytest.raises(KvStoreError):
        say(message)


_PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=60)


@given(_PRINTABLE, st.lists(st.integers(1, 1 << 22), min_size=1, max_size=MAX_PIDS))
def test_every_hello_survives_the_trip(client: str, pids: list[int]) -> None:
    message = json.dumps({"v": 1, "client": client, "pids": pids}).encode()
    assert say(message) == Hello(client, tuple(pids))


@pytest.mark.parametrize("name", ["\0" * 256, "a\nb", "\u2028", "\x7f"])
def test_unprintable_names_are_bad_input(name: str) -> None:
    """In JSON each of their bytes takes six: keeper and node could not tell 32 of them at once."""
    with pytest.raises(BadInput, match="unprintable"):
        Hello(name, (1,))


def test_descriptors_sent_with_a_hello_are_closed(arena_fd: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    say(b'{"v":1,"client":"a","pids":[1]}', (arena_fd,))
    with pytest.raises(BadInput):
        say(b"nonsense", (arena_fd, arena_fd))
    with pytest.raises(BadInput, match="longer"):
        say(b'{"v":1,"client":"a","pids":[1]}', (arena_fd,) * 9)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_client_gone_before_its_hello_is_bad_input() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with ours, pytest.raises(BadInput):
        receive_hello(ours)


def test_the_kernel_names_the_peer() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert peer_credentials(ours) == (os.getpid(), os.getuid(), os.getgid())
