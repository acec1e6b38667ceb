"""A client's eye on shared memory: the bytes of slots, and whether they are still the same.

The check is by generation. A slot given to another name gets a higher generation *before* a writer
may touch its bytes, so a reader that copies first and then finds the old generation has copied
the old bytes, whole; one that finds another generation throws its copy away.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from kvstore.client.replies import SlotRef
from kvstore.core.errors import SessionLost
from kvstore.core.slots import SlotState, pack_word, readable_at, reserved_slots, unpack
from kvstore.transport.arena import ArenaMapping

_POLL_FIRST_S: Final = 50e-6
_POLL_MOST_S: Final = 2e-3


class SharedArena:
    """One mapped arena. Nothing here makes a call; every answer is read from memory."""

    def __init__(self, mapping: ArenaMapping, *, number: int, block_bytes: int) -> None:
        self.number = number
        self.mapping = mapping
        self._block_bytes = block_bytes
        self._words = mapping.raw_words()

    def view(self, ref: SlotRef) -> memoryview:
        """Return the block's bytes, padding included, writable. Valid as long as it is held.

        Raises `SessionLost` for a slot of an earlier arena: its offset means nothing here.
        """
        if ref.arena != self.number:
            raise SessionLost("the slot belongs to an arena from before the keeper's restart")
        return self.mapping.block(ref.offset, self._block_bytes)

    def still(self, ref: SlotRef) -> bool:
        """Say whether the slot is readable and has been the same since `ref` was handed out."""
        return ref.arena == self.number and readable_at(self._words[ref.slot], ref.generation)

    def reserved_for(self, ref: SlotRef, session: int) -> bool:
        """Say whether the slot has stood reserved for a session since `ref` was handed out."""
        if ref.arena != self.number:
            return False
        return self._words[ref.slot] == pack_word(ref.generation, SlotState.RESERVED, session)

    def hopeless(self, ref: SlotRef) -> bool:
        """Say whether a slot that is not readable will not become so at this generation."""
        if ref.arena != self.number:
            return True
        word = unpack(self._words[ref.slot])
        return word.generation != ref.generation or word.state is not SlotState.RESERVED

    async def wait_ready(self, refs: Sequence[SlotRef], *, deadline_s: float) -> int:
        """Return how many of `refs`, from the first, are readable; wait for all of them.

        Ends early when the next one cannot turn readable any more. Polls: a look costs 200 ns,
        and a wake-up through the node would cost a call.
        """
        clock = asyncio.get_running_loop().time
        ends = clock() + deadline_s
        pause = _POLL_FIRST_S
        count = 0
        while True:
            while count < len(refs) and self.still(refs[count]):
                count += 1
            if count == len(refs):
                return count
            # Read again before giving up: the word may have turned readable in between.
            if self.hopeless(refs[count]) and not self.still(refs[count]):
                return count
            if clock() >= ends:
                return count
            await asyncio.sleep(pause)
            pause = min(2 * pause, _POLL_MOST_S)

    def reserved_by(self, session: int) -> dict[int, int]:
        """Return slot → generation of everything that is reserved for a session now."""
        return reserved_slots(self._words.tolist(), session)

    def close(self) -> None:
        """Let go of the words; the mapping itself ends with the last view of it."""
        self._words.release()
