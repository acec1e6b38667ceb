"""The slot word and the one table of slot states.

A slot word is an unsigned 64-bit integer in shared memory, written only by the node that owns
the arena and read by everyone who maps it:

    bit  63 ............ 24 | 23 ...... 4 | 3 ... 0
         generation (40)    | session (20)| state (4)

An aligned 8-byte store is atomic on x86-64 and arm64, so readers need no lock. The generation
grows by one whenever a slot is given to a new name, which is how a reader whose lease ended
notices (DESIGN §5, "Slots"). 2**40 reuses of one slot at 1,000 a second last 34 years.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray


class SlotState(IntEnum):
    """Where a slot stands in its life; see docs/life_of_a_block.md for the diagram."""

    FREE = 0
    """Nobody's. Bytes are meaningless."""
    RESERVED = 1
    """Given to one session's writer, and to nobody else until settled or its process exits."""
    COMMITTED = 2
    """Written. Readable on this host under a lease; its sum is not known yet."""
    SEALED = 3
    """Hashed. May be listed to others, demoted, sent, and re-adopted after a restart."""
    DRAINING = 5
    """Nobody may use it, yet a device or a reader has not let go. Not free until it does. (4 was a
    state that nothing entered.)"""


TRANSITIONS: Final[dict[SlotState, frozenset[SlotState]]] = {
    SlotState.FREE: frozenset({SlotState.RESERVED}),
    SlotState.RESERVED: frozenset({SlotState.COMMITTED, SlotState.DRAINING, SlotState.FREE}),
    SlotState.COMMITTED: frozenset({SlotState.SEALED, SlotState.DRAINING, SlotState.FREE}),
    SlotState.SEALED: frozenset({SlotState.DRAINING, SlotState.FREE}),
    SlotState.DRAINING: frozenset({SlotState.FREE}),
}
"""Every change a slot word may make. Anything else is a bug and asserts."""

READABLE: Final = frozenset({SlotState.COMMITTED, SlotState.SEALED})
"""States whose bytes a lease holder on this host may read."""

_STATE_BITS = 4
_STATE_MASK = (1 << _STATE_BITS) - 1
_SESSION_BITS = 20
_GENERATION_SHIFT = _STATE_BITS + _SESSION_BITS
_HOLDER_MASK = (1 << _GENERATION_SHIFT) - 1
MAX_SESSION = (1 << _SESSION_BITS) - 1
MAX_GENERATION = (1 << 40) - 1


class SlotWord(NamedTuple):
    """A decoded slot word. `session` is 0 when no writer holds the slot."""

    generation: int
    state: SlotState
    session: int

    def pack(self) -> int:
        """Return the 64-bit integer that stands in shared memory."""
        assert 0 <= self.generation <= MAX_GENERATION
        assert 0 <= self.session <= MAX_SESSION
        return (
            (self.generation << _GENERATION_SHIFT) | (self.session << _STATE_BITS) | int(self.state)
        )

    def to(self, state: SlotState, *, session: int = 0) -> "SlotWord":
        """Return the word after a legal change; a new reservation bumps the generation."""
        assert state in TRANSITIONS[self.state], f"{self.state.name} -> {state.name}"
        assert (session != 0) == (state is SlotState.RESERVED), "only a reservation has a session"
        generation = self.generation + (1 if state is SlotState.RESERVED else 0)
        return SlotWord(generation, state, session)


_LEGAL: Final = bytes(
    after in {int(state) for state in TRANSITIONS.get(SlotState(before), ())}
    if before in {int(state) for state in SlotState}
    else False
    for before in range(8)
    for after in range(8)
)


def may_turn(before: int, after: int) -> bool:
    """Say whether a slot may go from one state to another: `TRANSITIONS`, for raw integers."""
    return bool(_LEGAL[before << 3 | after])


def pack_word(generation: int, state: int, session: int = 0) -> int:
    """Return a slot word: `SlotWord.pack` without the object, for the node's inner loops."""
    return generation << _GENERATION_SHIFT | session << _STATE_BITS | state


def pack_words(generations: NDArray[np.uint64], state: int) -> NDArray[np.uint64]:
    """Return the words of many slots that nobody writes to, in one state."""
    return generations << np.uint64(_GENERATION_SHIFT) | np.uint64(state)


def unpack(word: int) -> SlotWord:
    """Decode a slot word read from shared memory.

    Raises `ValueError` for a state that does not exist: the memory is not a slot table.
    """
    return SlotWord(
        generation=word >> _GENERATION_SHIFT,
        state=SlotState(word & ((1 << _STATE_BITS) - 1)),
        session=(word >> _STATE_BITS) & MAX_SESSION,
    )


def readable_at(word: int, generation: int) -> bool:
    """Say whether a raw word still stands at `generation` in a readable state.

    The check after every copy, hence on raw integers: it costs a tenth of `unpack`.
    """
    return word >> _GENERATION_SHIFT == generation and word & _STATE_MASK in READABLE


def reserved_slots(words: Iterable[int], session: int) -> dict[int, int]:
    """Return slot → generation of the raw words that are reserved for `session`."""
    held = (session << _STATE_BITS) | SlotState.RESERVED
    return {
        slot: word >> _GENERATION_SHIFT
        for slot, word in enumerate(words)
        if word & _HOLDER_MASK == held
    }
