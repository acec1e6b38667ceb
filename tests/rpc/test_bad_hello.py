"""Nonsense on the keeper's session socket: refused, hung up on, and nobody else notices."""

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator

import pytest

from kvstore.core.errors import Refused
from kvstore.testing.node import RunningNode, start_node
from kvstore.transport.session_socket import MAX_HANDSHAKE_BYTES, Hello, connect_session
from tests.patience import PATIENCE_S
from tests.session_process import connect


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=8 << 20) as running:
        yield running


@pytest.fixture(autouse=True)
def _unharmed(node: RunningNode) -> Iterator[None]:
    pid = node.node_pid
    yield
    assert node.node_pid == pid
    assert "Traceback" not in node.log_tail()
    with connect(node.run_dir, "unharmed") as client:
        assert client.stats().node == node.name


def garbage_hello(kind: str) -> bytes:
    return {
        "empty": b"{}",
        "text": b"GET / HTTP/1.1\r\n\r\n",
        "binary": secrets.token_bytes(64),
        "too long": b"x" * (MAX_HANDSHAKE_BYTES + 1),
        "another's process": b'{"v":1,"client":"a","pids":[1]}'
        if os.getuid()
        else b'{"v":1,"client":"a","pids":[4194303]}',
        "another version": b'{"v":9,"client":"a","pids":[1]}',
    }[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "text", "binary", "too long", "another's process", "another version"]
)
def test_garbage_on_the_session_socket_is_refused(node: RunningNode, kind: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(str(node.run_dir / "keeper.sock"))
        sock.send(garbage_hello(kind))
        assert b'"refused"' in sock.recv(MAX_HANDSHAKE_BYTES)
        assert sock.recv(1) == b"", "and hung up"


def test_silent_and_vanishing_connections_hold_nobody_up(node: RunningNode) -> None:
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(20)]
    for sock in silent:
        sock.connect(str(node.run_dir / "keeper.sock"))
    for sock in silent[:10]:
        sock.close()
    with connect(node.run_dir, "beside the silent ones") as client:
        assert client.stats().node == node.name
    for sock in silent[10:]:
        sock.close()


def test_talking_after_the_handshake_ends_the_session(node: RunningNode) -> None:
    path = str(node.run_dir / "keeper.sock")
    _, arena_fd, sock = connect_session(path, Hello("chatty", (os.getpid(),)), deadline_ms=2000)
    os.close(arena_fd)
    with sock:
        sock.settimeout(PATIENCE_S)
        sock.send(b"anything")
        with contextlib.suppress(ConnectionResetError):  # it closes with our words unread
            assert sock.recv(1) == b""


def test_a_refusal_is_what_the_client_raises(node: RunningNode) -> None:
    gone = 4_194_303
    with pytest.raises(Refused):
        connect_session(
            str(node.run_dir / "keeper.sock"), Hello("dead pid", (gone,)), deadline_ms=2000
        )
