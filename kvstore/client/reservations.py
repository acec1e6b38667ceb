"""Keeps a lost answer from leaking slots. Pure: time and memory come in as arguments.

A reserved slot stays its session's until settled. When the answer to an `Acquire` is lost
(deadline, cancellation, a node that died after it had reserved), nobody knows of those slots, and
they would stay reserved until the session ends. The table in shared memory still tells: what is
reserved there for this session, and handed to nobody here, at two looks further apart than any
call that was in flight at the first, is a stray and can be aborted.
"""

from collections.abc import Iterable, Mapping

from kvstore.client.replies import SlotRef


class Reservations:
    """What this session's writers hold, and which reserved slots belong to nobody."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}
        self._suspects: dict[int, int] = {}

    def hold(self, refs: Iterable[SlotRef]) -> None:
        """Note slots that were handed to a caller."""
        for ref in refs:
            self._held[ref.slot] = ref.generation

    def settle(self, refs: Iterable[SlotRef]) -> None:
        """Forget slots that were committed or aborted, whatever came of it."""
        for ref in refs:
            if self._held.get(ref.slot) == ref.generation:
                del self._held[ref.slot]

    def look(self, reserved: Mapping[int, int]) -> list[tuple[int, int]]:
        """Return the strays: (slot, generation) unheld at this look and at the one before.

        `reserved` is slot → generation of what stands reserved for this session now.
        """
        unheld = {s: g for s, g in reserved.items() if self._held.get(s) != g}
        strays = [(s, g) for s, g in unheld.items() if self._suspects.get(s) == g]
        self._suspects = unheld
        return strays

    def __len__(self) -> int:
        return len(self._held)
