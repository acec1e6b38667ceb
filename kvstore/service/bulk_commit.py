"""Commits many slots at once where all is as it usually is: a Settle of 2,048 blocks. Pure."""

from collections.abc import Sequence

import numpy as np

from kvstore.core.slots import SlotState
from kvstore.service.roots import RootInfo
from kvstore.service.sessions import Session
from kvstore.service.slots import SlotTable

_LEAST = 32
"""Slots from which on one look at all of them is cheaper than one at each."""


def commit_all(
    table: SlotTable,
    session: Session,
    info: RootInfo,
    refs: Sequence[tuple[int, int]],
    now_ms: float,
) -> bool:
    """Make (slot, generation)s readable; False, and nothing done, where each needs its own look.

    They need one when few, when a session does not map the arena, and when any is not a
    reservation of this session and root at its generation, for a block that nobody else holds.
    The caller has the bytes hashed. The policy hears of them when it is next looked at: what it
    does with thousands of them takes as long as all the rest, and nobody waits for it.
    """
    if len(refs) < _LEAST or session.arrived is not None:
        return False
    slots = [slot for slot, _ in refs]
    ours = session.reserved.intersection(slots)
    if len(ours) < len(slots) or not table.outdone.isdisjoint(ours):  # another's, or named twice
        return False
    at = np.asarray(slots, np.int64)
    generations = np.asarray([generation for _, generation in refs], np.uint64)
    usual = (np.frombuffer(table.root_number, np.uint32)[at] == info.number).all() and (
        np.frombuffer(table.generation, np.uint64)[at] == generations
    ).all()
    if not usual:
        return False
    table.turn_all(at, SlotState.RESERVED, SlotState.COMMITTED)
    np.frombuffer(table.servable, np.uint8)[at] = 1
    size = len(slots) * info.shape.block_bytes
    table.reserved_bytes -= size
    table.used_bytes += size
    session.reserved -= ours
    session.reserved_bytes -= size
    table.insertions.tell_later(slots, now_ms)
    return True
