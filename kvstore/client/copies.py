"""`get` and `put`: whole blocks copied out of and into the arena.

Engines move blocks in place (`acquire`, `view`, `still`, `settle`); this is for everyone else.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from kvstore.client.arena import SharedArena
from kvstore.client.link import Link
from kvstore.client.replies import (
    Acquired,
    Names,
    Reserved,
    Settled,
    SlotRef,
    packed_names,
)
from kvstore.core.errors import BadInput
from kvstore.core.limits import NAME_BYTES
from kvstore.core.outcomes import SettleOutcome

if TYPE_CHECKING:
    from kvstore.client.aio import AsyncClient

_PART_BYTES: Final = 48 << 20
"""Committed at once: the node hashes a part while the next one is copied, and a call for each costs
as much as the copy of some MiB."""
_EDGE_BYTES: Final = 16 << 20
"""Of the first part, until which nothing is hashed, and of the last, while nothing is copied."""
Payload = bytes | bytearray | memoryview
_Result = TypeVar("_Result")


class WriteGate:
    """Ends the writing of a caller's buffers, from any thread and whatever the loop does."""

    def __init__(self) -> None:
        self._writing = threading.Lock()
        self._stopped = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether nothing more is to be copied."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Let no block begin any more; the one that is being written goes on. Never blocks."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, and wait for the block that is being written: nothing is written afterwards."""
        self.stop()
        with self._writing:
            pass

    def write(self, target: memoryview, source: memoryview) -> bool:
        """Copy one block; False, and nothing written, once the gate was stopped."""
        with self._writing:
            if self.stopped:
                return False
            _copy(target, source)
        return True


async def get_copies(
    client: "AsyncClient", link: Link, names: Names, deadline_ms: int
) -> list[bytes]:
    """Return verified copies of the longest prefix; see `AsyncClient.get`."""
    gate, size = WriteGate(), link.access.payload_bytes
    work = partial(copy_out, link.session.arena, payload_bytes=size, gate=gate)
    return await _with_leased(client, link, names, deadline_ms, work, gate)


async def get_into(
    client: "AsyncClient",
    link: Link,
    names: Names,
    buffers: Sequence[memoryview],
    deadline_ms: int,
    gate: WriteGate,
) -> int:
    """Fill buffers with the longest prefix; see `AsyncClient.get_into`."""
    packed, size = packed_names(names), link.access.payload_bytes
    if len(buffers) != len(packed) // NAME_BYTES:
        raise BadInput(f"{len(buffers)} buffers for {len(packed) // NAME_BYTES} names")
    targets = [_target(buffer, size) for buffer in buffers]
    work = partial(copy_out_into, link.session.arena, targets, gate=gate)
    return await _with_leased(client, link, packed, deadline_ms, work, gate)


def _target(buffer: memoryview, size: int) -> memoryview:
    """Return where a payload goes; raises `BadInput` for a buffer that cannot take one."""
    if buffer.readonly or not buffer.c_contiguous or buffer.nbytes < size:
        raise BadInput(f"a buffer is not {size} writable bytes in one piece")
    return buffer.cast("B")[:size]


async def _with_leased(
    client: "AsyncClient",
    link: Link,
    names: Names,
    deadline_ms: int,
    work: Callable[[Sequence[SlotRef]], _Result],
    gate: WriteGate,
) -> _Result:
    """Do work in a thread with the slots of the longest prefix, leased.

    Returns and raises when the thread has ended: nothing is written to a caller's buffer later,
    however often it is cancelled. A cancellation stops the gate, so that `work` ends soon.
    """
    arena = link.session.arena
    acquired = await client.acquire(
        names, deadline_ms=min(deadline_ms, link.config.call_ms), pending_ms=deadline_ms
    )
    try:
        refs = acquired.ready
        if acquired.pending:
            arrived = await arena.wait_ready(acquired.pending, deadline_s=deadline_ms / 1000)
            refs = refs + acquired.pending[:arrived]
        working = asyncio.get_running_loop().run_in_executor(None, work, refs)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            gate.stop()
            await _ended(working)
            raise
    finally:
        link.release_soon(acquired.lease)


async def _ended(working: "asyncio.Future[_Result]") -> None:
    """Wait until a thread has ended; a cancellation meanwhile does not end the wait."""
    while not working.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([working])


async def put_copies(
    client: "AsyncClient",
    link: Link,
    names: Names,
    payloads: Sequence[Payload],
    *,
    first_block: int,
    deadline_ms: int,
) -> list[SettleOutcome | None]:
    """Copy payloads into reserved slots and commit them; see `AsyncClient.put`."""
    packed = packed_names(names)
    count = len(packed) // NAME_BYTES
    if len(payloads) != count:
        raise BadInput(f"{len(payloads)} payloads for {count} names")
    sources = [memoryview(payload).cast("B") for payload in payloads]
    if any(len(source) != link.access.payload_bytes for source in sources):
        raise BadInput(f"a payload is not {link.access.payload_bytes} bytes long")
    acquired = await client.acquire(
        packed,
        reserve=count,
        first_block=first_block,
        deadline_ms=min(deadline_ms, link.config.call_ms),
    )
    outcomes: list[SettleOutcome | None] = [None] * count
    settled = await _copy_and_commit(client, link, acquired, sources, deadline_ms)
    for item, outcome in zip(acquired.reserved, settled, strict=True):
        outcomes[item.index] = outcome
    return outcomes


async def _copy_and_commit(
    client: "AsyncClient",
    link: Link,
    acquired: Acquired,
    sources: Sequence[memoryview],
    deadline_ms: int,
) -> list[SettleOutcome]:
    """Fill reserved slots and commit them, a part at a time: the node hashes while we copy on.

    One thread copies all parts without waiting for the event loop, which sends the commits.
    """
    parts = _parts(acquired.reserved, link.access.block_bytes)
    commits = _Commits(client, acquired, deadline_ms)
    loop = asyncio.get_running_loop()

    def say(part: Sequence[Reserved]) -> None:
        loop.call_soon_threadsafe(commits.commit, part)

    # Not a task: nothing may call it ended while the thread still writes.
    work = loop.run_in_executor(None, _fill, link.session.arena, parts, sources, say, commits.stop)
    link.note_writing(work)
    try:
        await asyncio.shield(work)
    except BaseException:
        commits.stop.set()
        link.spawn(commits.give_back_after(work))
        await commits.ended()
        raise
    if not parts and acquired.lease:
        await client.settle(release=[acquired.lease], deadline_ms=deadline_ms)
    return await commits.outcomes()


class _Commits:
    """The commits of one `put`, sent while the thread still copies what follows."""

    def __init__(self, client: "AsyncClient", acquired: Acquired, deadline_ms: int) -> None:
        self.stop = threading.Event()
        """Set when the put was given up: what is not committed then is given back."""
        self._client = client
        self._reserved = acquired.reserved
        self._lease = [acquired.lease] if acquired.lease else []
        self._deadline_ms = deadline_ms
        self._committed = 0
        self._tasks: list[asyncio.Task[Settled]] = []

    def commit(self, part: Sequence[Reserved]) -> None:
        """Commit slots that were filled, in their order; with the last ones the lease ends."""
        if self.stop.is_set():
            return
        self._committed += len(part)
        settling = self._client.settle(
            commit=[item.slot for item in part],
            release=self._lease if self._committed == len(self._reserved) else [],
            deadline_ms=self._deadline_ms,
        )
        self._tasks.append(asyncio.get_running_loop().create_task(settling))

    async def give_back_after(self, work: "asyncio.Future[None]") -> None:
        """Abort what was not committed, when the thread has ended.

        It may still be writing: a slot given back now would be written under its next owner.
        """
        await asyncio.wait([work])
        rest = [item.slot for item in self._reserved[self._committed :]]
        await self._client.settle(abort=rest, release=self._lease)

    async def ended(self) -> None:
        """Wait until all that were sent have ended; a failed one sweeps up by itself."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def outcomes(self) -> list[SettleOutcome]:
        """Return what became of each slot; raises what the first call that failed raised."""
        try:
            settled = await asyncio.gather(*self._tasks)
        except BaseException:
            await self.ended()
            raise
        return [outcome for one in settled for outcome in one.commit]


def _parts(reserved: Sequence[Reserved], block_bytes: int) -> list[Sequence[Reserved]]:
    """Cut a batch into parts of at most `_PART_BYTES`, the first and the last one smaller."""
    edge, step = (max(1, size // block_bytes) for size in (_EDGE_BYTES, _PART_BYTES))
    end = len(reserved)
    cuts = [0, *range(edge, end - edge, step), end - edge, end]
    bounds = sorted({max(0, cut) for cut in cuts})
    return [reserved[at:to] for at, to in pairwise(bounds)]


def _fill(
    arena: SharedArena,
    parts: Sequence[Sequence[Reserved]],
    sources: Sequence[memoryview],
    filled: Callable[[Sequence[Reserved]], object],
    stop: threading.Event,
) -> None:
    """Copy part after part into its slots, and say of each that it is there; in a thread."""
    for part in parts:
        if stop.is_set():
            return
        copy_in(arena, part, sources)
        filled(part)


def copy_out(
    arena: SharedArena, refs: Sequence[SlotRef], payload_bytes: int, gate: WriteGate
) -> list[bytes]:
    """Return copies of the blocks before the first one that was reused meanwhile."""
    blocks: list[bytes] = []
    for ref in refs:
        if gate.stopped:
            break
        block = bytes(arena.view(ref)[:payload_bytes])
        if not arena.still(ref):  # reused while it was being copied: a miss from here on
            break
        blocks.append(block)
    return blocks


def copy_out_into(
    arena: SharedArena, targets: Sequence[memoryview], refs: Sequence[SlotRef], gate: WriteGate
) -> int:
    """Copy blocks into `targets`; return how many come before the first one that was reused."""
    for index, (ref, target) in enumerate(zip(refs, targets, strict=False)):
        if not gate.write(target, arena.view(ref)[: len(target)]) or not arena.still(ref):
            return index
    return len(refs)


def copy_in(
    arena: SharedArena, reserved: Sequence[Reserved], sources: Sequence[memoryview]
) -> None:
    """Fill each reserved slot with `sources[index]`, and its padding with zeros."""
    for item in reserved:
        source = sources[item.index]
        view = arena.view(item.slot)
        _copy(view[: len(source)], source)
        if len(view) > len(source):
            # What an earlier tenant left in the padding goes no further.
            view[len(source) :] = bytes(len(view) - len(source))


def _copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes with the interpreter let go: slice assignment would stop the event loop."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
