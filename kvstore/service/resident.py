"""Finds the slots of a prompt's blocks: an Acquire of thousands, in a few looks. Pure."""

from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from kvstore.core.limits import NAME_BYTES
from kvstore.service.roots import RootInfo
from kvstore.service.slots import SlotTable

_ROW_LEAST: Final = 64
"""Blocks from which on it pays to look whether they lie side by side."""
_FEW: Final = 4
_NAME_WORDS: Final = NAME_BYTES // 8


def resident(
    table: SlotTable, info: RootInfo, packed: bytes, keys: NDArray[np.uint64]
) -> list[int]:
    """Return the slots of the longest prefix of names that may be leased now.

    `packed` are the names, `keys` [n] their keys. A key is a hint; names and roots are compared.
    """
    if len(keys) <= _FEW:
        return _one_by_one(table, info, packed, keys)
    row = _in_a_row(table, info, packed, keys)
    if len(row) == len(keys):
        return row
    found: list[int | None] = [*row, *map(table.index.get, keys[len(row) :].tolist())]
    if None in found:
        del found[found.index(None) :]
    slots = cast("list[int]", found)
    at = np.asarray(slots, np.int64)
    servable = np.frombuffer(table.servable, np.uint8)[at]
    if not servable.all():
        count = int(servable.argmin())
        slots, at = slots[:count], at[:count]
    # One comparison of all full names instead of one for each.
    under = np.frombuffer(table.root_number, np.uint32)[at] == info.number
    if packed.startswith(table.arena.names(at)) and under.all():
        return slots
    for index, slot in enumerate(slots):
        if not table.holds(slot, info, packed[index * NAME_BYTES : (index + 1) * NAME_BYTES]):
            return slots[:index]
    raise AssertionError("the names differ and every one of them is equal")


def _one_by_one(
    table: SlotTable, info: RootInfo, packed: bytes, keys: NDArray[np.uint64]
) -> list[int]:
    """Return what `resident` does, for so few that a pass over columns costs more."""
    slots: list[int] = []
    for index, key in enumerate(keys.tolist()):
        slot = table.find(info, key, packed[index * NAME_BYTES : (index + 1) * NAME_BYTES])
        if slot is None or not table.servable[slot]:
            break
        slots.append(slot)
    return slots


def held(
    table: SlotTable, info: RootInfo, packed: bytes, keys: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Say of each of n names [n] whether its block may be leased now, wherever the holes are."""
    here = np.zeros(len(keys), np.bool_)
    prefix = len(_in_a_row(table, info, packed, keys))
    here[:prefix] = True
    found = list(map(table.index.get, keys[prefix:].tolist()))
    listed = np.array([slot is not None for slot in found], np.bool_)
    at = np.array([slot for slot in found if slot is not None], np.int64)
    names = np.frombuffer(packed, np.uint64).reshape(-1, _NAME_WORDS)[prefix:][listed]
    there = np.frombuffer(table.arena.names(at), np.uint64).reshape(-1, _NAME_WORDS)
    good = (names == there).all(axis=1)
    good &= np.frombuffer(table.servable, np.uint8)[at] != 0
    good &= np.frombuffer(table.root_number, np.uint32)[at] == info.number
    listed[listed] = good
    here[prefix:] = listed
    return here


def _in_a_row(
    table: SlotTable, info: RootInfo, packed: bytes, keys: NDArray[np.uint64]
) -> list[int]:
    """Return the slots of a prefix that lies side by side, as one request computed it.

    That needs no look at the index for each block, which costs more than all the rest.
    """
    first = table.index.get(int(keys[0])) if len(keys) >= _ROW_LEAST else None
    if first is None:
        return []
    stop = first + table.arena.named(first, packed)
    void = table.servable.find(0, first, stop)
    stop = stop if void < 0 else void
    under = np.frombuffer(table.root_number, np.uint32)[first:stop] == info.number
    return list(range(first, stop if under.all() else first + int(under.argmin())))
