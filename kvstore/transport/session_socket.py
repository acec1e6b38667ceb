"""The session handshake on the keeper's Unix socket; both ends of it.

One SOCK_SEQPACKET connection is one session: the client says `Hello`, the keeper answers with a
`Grant` and the arena's descriptor (SCM_RIGHTS) or with a refusal, and from then on nothing more is
said. The open connection *is* the session; the end of it, or of a process named in the hello,
ends the session and gives back what it held. SEQPACKET keeps message borders: nothing to frame.

    client ── {"v":1,"client":"worker-0","pids":[4711]} ──────────────────────────▶ keeper
    client ◀── {"v":1,"session":7,"token":"…","rpc":"unix:…",…} + memfd ──────────── keeper
    client ◀── {"v":1,"refused":"too many sessions","retry_after_ms":100} ────────── keeper
"""

import json
import os
import socket
import struct
import time
from array import array
from dataclasses import dataclass
from typing import Any, Final

from kvstore.core.errors import BadInput, Refused, Unreachable
from kvstore.core.limits import MAX_ID_BYTES
from kvstore.core.slots import MAX_SESSION

VERSION: Final = 1
MAX_HANDSHAKE_BYTES: Final = 4096
"""One JSON message; a hello with `MAX_PIDS` pids fits."""
MAX_PIDS: Final = 256
"""Processes of one session: a tensor-parallel group on one host."""
MAX_SOCKET_PATH_BYTES: Final = 107
"""What `sockaddr_un` has room for, without its terminating zero."""
TOKEN_BYTES: Final = 16

_MAX_PID: Final = 1 << 22  # PID_MAX_LIMIT of 64-bit Linux
_CREDENTIALS: Final = struct.Struct("3i")
_TIMEVAL: Final = struct.Struct("ll")
_MAX_FDS: Final = 4
_TEXT_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class Hello:
    """What a client says of itself. `pids` are the processes whose end ends the session."""

    client: str
    pids: tuple[int, ...]

    def __post_init__(self) -> None:
        if _utf8_bytes(self.client) > MAX_ID_BYTES:
            raise BadInput(f"client name is not UTF-8 text of at most {MAX_ID_BYTES} bytes")
        if not self.client.isprintable():
            raise BadInput("client name has unprintable characters")
        if not 0 < len(self.pids) <= MAX_PIDS:
            raise BadInput(f"{len(self.pids)} pids in a hello; 1 to {MAX_PIDS} allowed")
        if not all(0 < pid <= _MAX_PID for pid in self.pids):
            raise BadInput("a pid in the hello is not a process id")


@dataclass(frozen=True, slots=True)
class Grant:
    """A session as the keeper gives it out; the arena's descriptor travels beside it."""

    session: int
    token: bytes
    """16 random bytes; sent as `kvstore-session-bin` with every RPC."""
    rpc: str
    """gRPC address of the cache node, `unix:/path`."""
    node: str
    incarnation: int

    def __post_init__(self) -> None:
        if not 0 < self.session <= MAX_SESSION:
            raise BadInput(f"session {self.session} is outside 1..{MAX_SESSION}")
        if len(self.token) != TOKEN_BYTES:
            raise BadInput(f"session token has {len(self.token)} bytes, not {TOKEN_BYTES}")
        if self.incarnation < 0:
            raise BadInput(f"incarnation {self.incarnation} is negative")


def connect_session(
    path: str, hello: Hello, *, deadline_ms: int
) -> tuple[Grant, int, socket.socket]:
    """Open a session; return the grant, the arena's descriptor and the session's socket.

    Blocks for at most `deadline_ms`. The caller owns descriptor and socket. Raises `Unreachable`
    when nobody answers in time, `Refused` when the keeper says no, `BadInput` for a path or an
    answer that is no session socket's.
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise BadInput(f"socket path {path} is longer than {MAX_SOCKET_PATH_BYTES} bytes")
    ends = time.monotonic() + deadline_ms / 1000
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise Unreachable(f"no socket to connect with: {error.strerror}") from error
    try:
        _connect(sock, path, deadline_ms)
        sock.settimeout(max(0.001, ends - time.monotonic()))
        sock.send(_encode({"client": hello.client, "pids": list(hello.pids)}))
        sock.settimeout(max(0.001, ends - time.monotonic()))
        grant, arena_fd = _receive_grant(sock)
    except OSError as error:
        sock.close()
        raise Unreachable(f"no session on {path}: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise
    sock.settimeout(None)
    return grant, arena_fd, sock


def receive_hello(sock: socket.socket) -> Hello:
    """Read the hello from an accepted connection (one `recv`; call it when readable).

    Raises `BadInput` for anything that is not a hello, an immediate end included.
    """
    message, descriptors = _receive(sock)
    _close_all(descriptors)
    fields = _decode(message)
    pids = fields.get("pids")
    client = fields.get("client")
    if not isinstance(client, str) or not isinstance(pids, list):
        raise BadInput("hello lacks `client` or `pids`")
    if not all(type(pid) is int for pid in pids):
        raise BadInput("a pid in the hello is not an integer")
    return Hello(client, tuple(pids))


def send_grant(sock: socket.socket, grant: Grant, arena_fd: int) -> None:
    """Answer a hello with a session and the arena. Raises `OSError` when the client is gone."""
    message = _encode(
        {
            "session": grant.session,
            "token": grant.token.hex(),
            "rpc": grant.rpc,
            "node": grant.node,
            "incarnation": grant.incarnation,
        }
    )
    socket.send_fds(sock, [message], [arena_fd])


def send_refusal(sock: socket.socket, message: str, *, retry_after_ms: int = 0) -> None:
    """Answer a hello with no; the client raises `Refused`. Raises `OSError` when it is gone."""
    text = message.encode()[:_TEXT_BYTES].decode(errors="ignore")
    sock.send(_encode({"refused": text, "retry_after_ms": retry_after_ms}))


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return (pid, uid, gid) of the process that connected, as the kernel saw it then."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def _connect(sock: socket.socket, path: str, deadline_ms: int) -> None:
    # A full backlog makes a non-blocking connect fail at once with EAGAIN; a blocking one waits,
    # bounded by the send timeout.
    whole, rest = divmod(max(1, deadline_ms), 1000)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(whole, rest * 1000))
    sock.connect(path)


def _receive_grant(sock: socket.socket) -> tuple[Grant, int]:
    message, descriptors = _receive(sock)
    try:
        if not message:
            raise Unreachable("the keeper closed the connection during the handshake")
        fields = _decode(message)
        refused = fields.get("refused")
        if isinstance(refused, str):
            retry_after = fields.get("retry_after_ms")
            raise Refused(refused, retry_after if type(retry_after) is int else 0)
        grant = _grant_from(fields)
        if len(descriptors) != 1:
            raise BadInput(f"a grant with {len(descriptors)} descriptors instead of the arena's")
    except BaseException:
        _close_all(descriptors)
        raise
    return grant, descriptors[0]


def _grant_from(fields: dict[str, Any]) -> Grant:
    session, incarnation = fields.get("session"), fields.get("incarnation")
    token, rpc, node = fields.get("token"), fields.get("rpc"), fields.get("node")
    if type(session) is not int or type(incarnation) is not int:
        raise BadInput("grant lacks `session` or `incarnation`")
    if not (isinstance(token, str) and isinstance(rpc, str) and isinstance(node, str)):
        raise BadInput("grant lacks `token`, `rpc` or `node`")
    try:
        token_bytes = bytes.fromhex(token)
    except ValueError as error:
        raise BadInput("grant's token is not hexadecimal") from error
    return Grant(session, token_bytes, rpc, node, incarnation)


def _encode(fields: dict[str, Any]) -> bytes:
    message = json.dumps({"v": VERSION, **fields}, separators=(",", ":")).encode()
    if len(message) > MAX_HANDSHAKE_BYTES:
        raise BadInput(f"handshake of {len(message)} bytes; {MAX_HANDSHAKE_BYTES} allowed")
    return message


def _decode(message: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise BadInput("handshake message is not JSON") from error
    if not isinstance(fields, dict):
        raise BadInput("handshake message is not an object")
    if fields.get("v") != VERSION:
        raise BadInput(f"handshake version {fields.get('v')!r:.40}; this side speaks {VERSION}")
    return fields


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Return one message and the descriptors that came with it, all close-on-exec."""
    message, ancillary, flags, _ = sock.recvmsg(
        MAX_HANDSHAKE_BYTES, socket.CMSG_SPACE(_MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
    )
    descriptors = array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        _close_all(list(descriptors))
        raise BadInput(f"handshake message is longer than {MAX_HANDSHAKE_BYTES} bytes")
    return message, list(descriptors)


def _utf8_bytes(text: str) -> int:
    """Return the encoded size; a lone surrogate, legal in JSON, counts as far too long."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return MAX_HANDSHAKE_BYTES


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
