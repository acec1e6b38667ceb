"""How a publisher's events lie in Redis or Valkey: keys, entries, and the one configuration.

    kvstore:publisher:NAME                     heartbeat, expires: {incarnation, writer, stream}
    kvstore:events:NAME:INCARNATION:WRITER:N   stream N: a snapshot, then every change and mark

A stream starts with a whole snapshot, so whoever comes late reads one stream from its beginning.
When enough was written behind the snapshot the writer begins stream N + 1; the last entry of
stream N says where in N + 1 those go on who read everything: behind the snapshot.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError
from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvstore.core.errors import BadInput
from kvstore.core.limits import MARK_PERIOD_MS, SUSPECT_AFTER_MS
from kvstore.directory.events import Event
from kvstore.rpc.convert import event_from_reply
from kvstore.rpc.v1 import watch_pb2

EVENT_FIELD: Final = b"e"
"""An entry's field that holds one packed `WatchReply`."""

NEXT_FIELD: Final = b"n"
"""The field of a stream's last entry: where those go on who read the stream to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisConfig:
    """Where the server is and how patient both sides are. Raises `BadInput`."""

    url: str
    """`redis://[user:password@]host:port/db`, `rediss://…` for TLS, `unix://path`."""
    mark_period_ms: int = MARK_PERIOD_MS
    heartbeat_ms: int = SUSPECT_AFTER_MS
    """How long a heartbeat lives that is not renewed."""
    timeout_ms: int = 1_000
    """A server that answers nothing for so long is away."""
    stream_names: int = 1 << 18
    """Names written behind a stream's snapshot before the next one begins: 8 MiB."""
    linger_ms: int = 30_000
    """How long a stream stays that is no longer written: what a reader may lag."""
    min_backoff_ms: int = 100
    max_backoff_ms: int = 2_000

    def __post_init__(self) -> None:
        try:
            parse_url(self.url)
        except ValueError as error:
            raise BadInput(f"{hidden(self.url)!r} is no Redis URL: {error}") from None
        for name in ("mark_period_ms", "heartbeat_ms", "timeout_ms", "stream_names", "linger_ms",
                     "min_backoff_ms"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise BadInput(f"redis {name} must be positive, got {getattr(self, name)}")
        if self.heartbeat_ms <= self.mark_period_ms:
            raise BadInput(f"heartbeat_ms {self.heartbeat_ms} is not above the mark period")
        if self.max_backoff_ms < self.min_backoff_ms:
            raise BadInput("redis max_backoff_ms is below min_backoff_ms")

    def connect(self, client_name: str) -> Redis:
        """Return a client that tries everything once; close it with `aclose`."""
        seconds = self.timeout_ms / 1_000
        return Redis.from_url(
            self.url,
            socket_timeout=seconds,
            socket_connect_timeout=seconds,
            retry=Retry(NoBackoff(), 0),
            client_name="".join(c if c.isprintable() and c != " " else "_" for c in client_name),
        )


def hidden(url: str) -> str:
    """Return a URL without its user and password, for messages."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def heartbeat_key(publisher: str) -> str:
    """Return the key that says which stream a publisher writes at this moment."""
    return f"kvstore:publisher:{publisher}"


def stream_key(publisher: str, incarnation: int, writer: str, number: int) -> str:
    """Return the key of a stream; `writer` tells apart those who connect anew."""
    return f"kvstore:events:{publisher}:{incarnation}:{writer}:{number}"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What the heartbeat key says while its publisher is alive."""

    incarnation: int
    writer: str
    stream: str

    def pack(self) -> str:
        """Return the value of the key."""
        fields = {"incarnation": self.incarnation, "writer": self.writer, "stream": self.stream}
        return json.dumps(fields)

    @classmethod
    def unpack(cls, raw: bytes) -> "Heartbeat":
        """Read what `pack` wrote; raises `BadInput` for anything else."""
        try:
            fields = json.loads(raw)
            return cls(int(fields["incarnation"]), str(fields["writer"]), str(fields["stream"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"not a heartbeat: {error}") from None


@dataclass(frozen=True, slots=True)
class Next:
    """Where a stream goes on: in `stream`, after the entry `after`."""

    stream: str
    after: str

    def pack(self) -> str:
        """Return the value of the field."""
        return json.dumps({"stream": self.stream, "after": self.after})

    @classmethod
    def unpack(cls, raw: bytes) -> "Next":
        """Read what `pack` wrote; raises `BadInput` for anything else."""
        try:
            fields = json.loads(raw)
            return cls(str(fields["stream"]), str(fields["after"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"not the end of a stream: {error}") from None


def end_if_cancelled() -> None:
    """Raise `CancelledError` where this task was cancelled and a call returned all the same.

    The client's own timeouts can take a cancellation for theirs (seen with redis 8.1: a cancelled
    XREAD answered as if nothing were); a loop around its calls would then run for ever.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def event_in(raw: bytes) -> Event | None:
    """Return the event in an entry, None for a kind that this build does not know."""
    try:
        reply = watch_pb2.WatchReply.FromString(raw)
    except DecodeError as error:
        raise BadInput(f"an entry is no event: {error}") from None
    return event_from_reply(reply)
