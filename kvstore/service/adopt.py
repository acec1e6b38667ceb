"""What a new incarnation makes of the slot table that the one before left. Pure.

    SEALED                      adopted, not servable until its bytes were verified
    RESERVED, session lives     stays reserved: its writer may be writing at this moment
    everything else             free; generations go on

Chunks are not stored: they are read off the places that every slot of a chunk has in its record. A
crash while a chunk was laid out or cleared leaves a part of it whose slots are all free: dropped.
Chunks that lie side by side are told apart by their usual size, so that they can still change
class one by one.
"""

from collections.abc import Iterable
from functools import cache
from typing import Final, NamedTuple

from kvstore.core.errors import KvStoreError
from kvstore.core.layout import round_up
from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.names import BlockName
from kvstore.core.slots import MAX_SESSION, SlotState, SlotWord, unpack
from kvstore.directory.events import TierKind
from kvstore.service.roots import BlockShape, keys_of
from kvstore.service.sessions import Session
from kvstore.service.slots import SlotTable
from kvstore.service.store import ArenaStore
from kvstore.tiers.arena_space import ArenaSpace, Extent
from kvstore.transport.arena import ArenaMapping


class Adopted(NamedTuple):
    """What was found."""

    sealed: int
    reserved: int
    freed: int
    unreadable: int
    """Slot words or records that made no sense; their slots are free."""


_NEVER_USED: Final = SlotWord(0, SlotState.FREE, 0)


class _Place(NamedTuple):
    offset: int
    block_bytes: int
    slot: int


def adopt(store: ArenaStore, now_ms: float) -> Adopted:
    """Take over the arena; sessions that still live must be open in `store` already."""
    table = store.table
    words, unreadable = _words(table.arena)
    table.generation[:] = type(table.generation)("Q", (word.generation for word in words))
    used = _restore_chunks(table, words)
    sealed = [slot for slot in used if words[slot].state is SlotState.SEALED]
    reserved = [slot for slot in used if words[slot].state is SlotState.RESERVED]
    # Suffixes first: with no memory of uses, the policy should drop those first.
    sealed.sort(key=lambda slot: table.arena.record(slot).position, reverse=True)
    kept = {slot for slot in sealed if _adopt_one(store, slot, words[slot], now_ms)}
    kept |= {slot for slot in reserved if _adopt_one(store, slot, words[slot], now_ms)}
    freed = 0
    for slot in used:
        if slot not in kept:
            _set_free(table, slot, words[slot])
            table.space.give(slot)
            freed += words[slot].state is not SlotState.FREE
    _publish(table, [slot for slot in sealed if slot in kept])
    sealed_kept = sum(slot in kept for slot in sealed)
    return Adopted(sealed_kept, len(kept) - sealed_kept, freed, unreadable)


def _words(arena: ArenaMapping) -> tuple[list[SlotWord], int]:
    words: list[SlotWord] = []
    unreadable = 0
    for raw in arena.raw_words().tolist():
        if not raw:  # most slots of a big arena with big blocks: millions were never used
            words.append(_NEVER_USED)
            continue
        try:
            words.append(unpack(raw))
        except ValueError:
            unreadable += 1
            words.append(SlotWord(raw >> 24, SlotState.DRAINING, 0))
    return words, unreadable


def _restore_chunks(table: SlotTable, words: list[SlotWord]) -> list[int]:
    """Rebuild the chunks and return their slots; slots of no chunk are cleared and free."""
    space = table.space
    used: list[int] = []
    for run in _runs(table.arena, space, words):
        extent = Extent(
            run[0].offset, round_up(run[-1].offset + run[-1].block_bytes, space.unit_bytes)
        )
        slots = [place.slot for place in run]
        live = any(words[slot].state is not SlotState.FREE for slot in slots)
        if live and space.may_restore(extent):
            space.restore(extent, run[0].block_bytes, slots)
            for place in run:
                table.granules[place.slot] = place.offset // GRANULE_BYTES
            used += slots
            continue
        for slot in reversed(slots):
            _set_free(table, slot, words[slot])
            table.arena.clear(slot)
    space.forget_ids()
    return used


def _runs(arena: ArenaMapping, space: ArenaSpace, words: list[SlotWord]) -> Iterable[list[_Place]]:
    """Yield runs of slots of one size that lie side by side, at most a usual chunk each."""
    run: list[_Place] = []
    chunk_bytes = cache(space.chunk_bytes)
    places = sorted(_Place(offset, size, slot) for slot, offset, size in arena.placed())
    for place in places:
        stop = run[-1].offset + run[-1].block_bytes if run else 0
        if run and place.offset < stop and words[place.slot].state is SlotState.FREE:
            arena.clear(place.slot)  # a torn record of a slot that nobody had yet
            continue
        alike = run and place.offset == stop and place.block_bytes == run[0].block_bytes
        whole = run and stop - run[0].offset >= chunk_bytes(run[0].block_bytes)
        if run and (not alike or (whole and stop % space.unit_bytes == 0)):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _adopt_one(store: ArenaStore, slot: int, word: SlotWord, now_ms: float) -> bool:
    """Take one sealed or reserved slot over; False when it has to be freed instead."""
    table = store.table
    record = table.arena.record(slot)
    session: Session | None = None
    if word.state is SlotState.RESERVED:
        session = store.sessions.by_number(word.session)
        if session is None:
            return False
    shape = BlockShape(record.block_bytes, record.payload_bytes, record.shares)
    try:
        shape.check(table.space.data_bytes)
        info = table.roots.open(record.root, shape)
    except KvStoreError:
        return False
    key = keys_of(info, record.name)[0]
    if session is None:
        if key in table.index:
            return False
        table.adopt(slot, word, info, key, now_ms)
        return True
    holder = table.index.get(key)
    table.adopt(slot, word, info, key, now_ms)
    if holder is not None:  # somebody's sealed copy: the late writer will learn DUPLICATE
        table.index[key] = holder
    if store.private.owns(info):
        store.private.adopt(session, slot)
        return True
    session.reserved.add(slot)
    session.reserved_bytes += shape.block_bytes
    return True


def _set_free(table: SlotTable, slot: int, word: SlotWord) -> None:
    if word.state is not SlotState.FREE:
        assert word.session <= MAX_SESSION
        table.arena.set_word(slot, SlotWord(word.generation, SlotState.FREE, 0))


def _publish(table: SlotTable, sealed: list[int]) -> None:
    """List adopted blocks, by root: a hint, since Acquire verifies before it serves."""
    by_root: dict[int, list[BlockName]] = {}
    for slot in sealed:
        names = by_root.setdefault(table.root_number[slot], [])
        names.append(BlockName(table.arena.name(slot)))
    for number, names in by_root.items():
        info = table.roots.at(number)
        table.publisher.set(
            info.root,
            TierKind.DRAM,
            names,
            block_bytes=info.shape.block_bytes,
            group=info.group,
        )
