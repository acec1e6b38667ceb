"""`get` and `put`: whole blocks copied out of and into the arena.

Engines move blocks in place (`acquire`, `view`, `still`, `settle`); this is for everyone else.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

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

_PART_BYTES: Final = 16 << 20
"""Copied and committed at once: the copy of the next part hides the call and the hashing."""
Payload = bytes | bytearray | memoryview


async def get_copies(
    client: "AsyncClient", link: Link, names: Names, deadline_ms: int
) -> list[bytes]:
    """Return verified copies of the longest prefix; see `AsyncClient.get`."""
    arena = link.session.arena
    acquired = await client.acquire(
        names, deadline_ms=min(deadline_ms, link.config.call_ms), pending_ms=deadline_ms
    )
    try:
        refs = acquired.ready
        if acquired.pending:
            arrived = await arena.wait_ready(acquired.pending, deadline_s=deadline_ms / 1000)
            refs = refs + acquired.pending[:arrived]
        blocks = await asyncio.to_thread(copy_out, arena, refs, link.access.payload_bytes)
    except BaseException:
        link.spawn(link.release(acquired.lease))
        raise
    await link.release(acquired.lease)
    return blocks


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
    """Fill reserved slots and commit them, a part at a time: the node hashes while we copy on."""
    parts = _parts(acquired.reserved, link.access.block_bytes)
    lease = [acquired.lease] if acquired.lease else []
    commits: list[asyncio.Task[Settled]] = []
    loop = asyncio.get_running_loop()
    copied = 0
    try:
        for part in parts:
            # Not a task: nothing may call it ended while the thread still writes.
            work = loop.run_in_executor(None, copy_in, link.session.arena, part, sources)
            link.note_writing(work)
            try:
                await asyncio.shield(work)
            except BaseException:
                rest = [item.slot for item in acquired.reserved[copied:]]
                link.spawn(_abort_after(client, work, rest, lease))
                raise
            copied += len(part)
            slots = [item.slot for item in part]
            release = lease if copied == len(acquired.reserved) else []
            commits.append(
                asyncio.ensure_future(
                    client.settle(commit=slots, release=release, deadline_ms=deadline_ms)
                )
            )
        if not parts and lease:
            await client.settle(release=lease, deadline_ms=deadline_ms)
        settled = await asyncio.gather(*commits)
    except BaseException:
        await asyncio.gather(*commits, return_exceptions=True)  # a failed one sweeps up itself
        raise
    return [outcome for one in settled for outcome in one.commit]


def _parts(reserved: Sequence[Reserved], block_bytes: int) -> list[Sequence[Reserved]]:
    """Cut a batch into parts of about `_PART_BYTES`."""
    step = max(1, _PART_BYTES // block_bytes)
    return [reserved[at : at + step] for at in range(0, len(reserved), step)]


async def _abort_after(
    client: "AsyncClient", work: "asyncio.Future[None]", slots: list[SlotRef], lease: list[int]
) -> None:
    # The thread may still be writing: a slot given back now would be written under its next owner.
    await asyncio.wait([work])
    await client.settle(abort=slots, release=lease)


def copy_out(arena: SharedArena, refs: Sequence[SlotRef], payload_bytes: int) -> list[bytes]:
    """Return copies of the blocks before the first one that was reused meanwhile."""
    blocks: list[bytes] = []
    for ref in refs:
        block = bytes(arena.view(ref)[:payload_bytes])
        if not arena.still(ref):  # reused while it was being copied: a miss from here on
            break
        blocks.append(block)
    return blocks


def copy_in(
    arena: SharedArena, reserved: Sequence[Reserved], sources: Sequence[memoryview]
) -> None:
    """Fill each reserved slot with `sources[index]`, and its padding with zeros."""
    for item in reserved:
        source = sources[item.index]
        view = arena.view(item.slot)
        view[: len(source)] = source
        # What an earlier tenant left in the padding goes no further.
        view[len(source) :] = bytes(len(view) - len(source))
