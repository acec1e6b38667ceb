"""Recordings of what callers ask the node for: bounded, salted, and free while nobody records.

`Acquire` only appends a reference to a queue; hashing is done by the stream that empties it. A
name never leaves: ids are keyed hashes (BLAKE2b, RFC 7693) under a salt that exists in this process
only and only while the recording lasts.
"""

import asyncio
import hashlib
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import grpc.aio

from kvstore.core.errors import Forbidden, Refused
from kvstore.core.limits import BLOCK_TOKENS, NAME_BYTES
from kvstore.observe.metrics import NodeMetrics
from kvstore.rpc.convert import check_id
from kvstore.rpc.gate import identify
from kvstore.rpc.identity import Identity, Role
from kvstore.rpc.v1 import record_pb2, record_pb2_grpc

MAX_RECORDINGS: Final = 4
QUEUED_NAMES: Final = 1 << 18
"""Names that one recording may have waiting: 8 MiB. Beyond, accesses are dropped and counted."""
GATHER_S: Final = 0.05
"""Accesses of this long become one message."""
_MESSAGE_NAMES: Final = 1 << 14
"""Names hashed before others run: about 15 ms."""

if TYPE_CHECKING:  # generic in the type stubs only
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext


@dataclass(slots=True)
class Recording:
    """The queue between the node's calls and one subscriber. Pure: its owner passes time in."""

    began_ms: float
    salt: bytes
    max_names: int = QUEUED_NAMES
    dropped: int = 0
    """Accesses for which there was no room."""
    _queued: deque[tuple[float, int, bytes]] = field(default_factory=deque)
    _names: int = 0

    def note(self, now_ms: float, first_block: int, packed: bytes) -> bool:
        """Queue one access; False when it had to be dropped."""
        count = len(packed) // NAME_BYTES
        if self._names + count > self.max_names:
            self.dropped += 1
            return False
        self._queued.append((now_ms, first_block, packed))
        self._names += count
        return True

    def take(self, max_names: int) -> list[record_pb2.RecordedAccess]:
        """Return the oldest accesses, hashed: one at least, and about `max_names` names."""
        taken: list[record_pb2.RecordedAccess] = []
        left = max_names
        while self._queued and left > 0:
            now_ms, first_block, packed = self._queued.popleft()
            blocks = [
                _salted(packed[at : at + NAME_BYTES], self.salt)
                for at in range(0, len(packed), NAME_BYTES)
            ]
            self._names -= len(blocks)
            left -= len(blocks)
            taken.append(
                record_pb2.RecordedAccess(
                    elapsed_ms=max(0, round(now_ms - self.began_ms)),
                    first_block=first_block,
                    blocks=blocks,
                )
            )
        return taken


def _salted(name: bytes, salt: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8, key=salt).digest(), "little")


class Recorders:
    """Every recording of this node."""

    def __init__(self, metrics: NodeMetrics, clock_ms: Callable[[], float] | None = None) -> None:
        self._metrics = metrics
        self._clock_ms = clock_ms or _now_ms
        self._running: list[Recording] = []

    def __len__(self) -> int:
        return len(self._running)

    def begin(self) -> Recording:
        """Start a recording; raises `Refused` at `MAX_RECORDINGS`."""
        if len(self._running) >= MAX_RECORDINGS:
            raise Refused(f"{MAX_RECORDINGS} recordings run already", retry_after_ms=1_000)
        recording = Recording(self._clock_ms(), secrets.token_bytes(32))
        self._running.append(recording)
        return recording

    def end(self, recording: Recording) -> None:
        """Stop a recording and forget its salt."""
        self._running.remove(recording)

    def note(self, first_block: int, packed: bytes) -> None:
        """Tell every recording of one access. Costs one comparison while there is none."""
        if not self._running or not packed:
            return
        now_ms = self._clock_ms()
        for recording in self._running:
            if not recording.note(now_ms, first_block, packed):
                self._metrics.unrecorded.inc()


class RecorderService(record_pb2_grpc.RecorderServicer):  # type: ignore[misc]
    """Answers `Record`."""

    def __init__(self, recorders: Recorders, identity: Identity) -> None:
        self._recorders = recorders
        self._identity = identity

    async def Record(
        self, request: record_pb2.RecordRequest, context: Context
    ) -> AsyncIterator[record_pb2.RecordReply]:
        """Stream accesses until the subscriber goes; the first reply says that it has begun."""
        # It shows how all tenants use the cache, though not what they say.
        if Role.ADMIN not in identify(self._identity, context).roles:
            raise Forbidden("recording needs the admin role")
        check_id(request.subscriber, "subscriber")
        recording = self._recorders.begin()
        dropped = 0
        try:
            yield record_pb2.RecordReply(block_tokens=BLOCK_TOKENS)
            while True:
                taken = recording.take(_MESSAGE_NAMES)
                if taken or recording.dropped != dropped:
                    dropped = recording.dropped
                    yield record_pb2.RecordReply(
                        accesses=taken, dropped=dropped, block_tokens=BLOCK_TOKENS
                    )
                await asyncio.sleep(0 if taken else GATHER_S)
        finally:
            self._recorders.end(recording)


def _now_ms() -> float:
    return time.monotonic() * 1_000
