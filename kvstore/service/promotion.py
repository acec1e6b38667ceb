"""Which blocks below DRAM an Acquire starts moving up, and what is on its way already. Pure.

    names     [ ready … | pending …                              | rest ]
    pending     being loaded already: joined, one flight per block however many ask
                held below: a slot is reserved for the loader, and a load is handed out
                resident behind a hole: leased too

Blocks move in prefix order and only as many as are predicted to arrive while the caller waits: a
block that comes too late costs the device and the caller's patience, and saves nothing.
"""

from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import MissReason
from kvstore.core.slots import MAX_SESSION
from kvstore.directory.events import TierKind
from kvstore.service.reserver import Reserver, Wanted
from kvstore.service.sessions import Session

LOADER_SESSION: Final = MAX_SESSION
"""Session number of slots that the node itself fills; the keeper never hands it out."""


class Load(NamedTuple):
    """A reserved slot to be filled from below."""

    slot: int
    generation: int
    tier: TierKind
    block_bytes: int


class Below(Protocol):
    """What lies below DRAM, as a decision needs to know it; from memory, never a device."""

    def holder(self, root: Root, name: BlockName, *, own: bool = False) -> TierKind | None:
        """Return the fastest tier that holds a block and can be read now.

        `own`: among those of this node alone.
        """
        ...

    def loadable_bytes(self, tier: TierKind, within_ms: float) -> int:
        """Return how many bytes more would arrive from a tier within a time, as predicted."""
        ...


@dataclass(slots=True)
class Pending:
    """Slots that follow the ready prefix, in order."""

    slots: list[int] = field(default_factory=list)
    tiers: list[TierKind] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    reason: MissReason = MissReason.NONE
    """Why it ends where it does, where the table alone cannot tell."""


class Promoter:
    """Decides over one table."""

    def __init__(self, reserver: Reserver, below: Below) -> None:
        self.loader = Session(LOADER_SESSION, b"", "loader")
        self._reserver = reserver
        self._below = below
        self._from: dict[int, TierKind] = {}
        self._unwanted: set[int] = set()
        """Slots being filled with blocks that were forgotten meanwhile."""

    def pending(self, wanted: Wanted, found: int, within_ms: float) -> Pending:
        """Return what follows the `found` ready blocks within `within_ms`, reserving for it.

        Every slot of the answer is pinned, for the lease that the caller grants.
        """
        table = self._reserver.table
        answer = Pending()
        budget: dict[TierKind, int] = {}
        for index in range(found, len(wanted.keys)):
            slot = table.index.get(wanted.keys[index])
            if slot is None:
                tier = self._start(wanted, index, within_ms, budget, answer)
                if tier is None:
                    break
                slot = answer.loads[-1].slot
            elif not table.holds(slot, wanted.info, wanted.name(index)):
                break
            elif table.servable[slot]:
                tier = TierKind.DRAM
            elif slot in self._from:
                tier = self._from[slot]
            else:
                break
            table.pin([slot])  # at once: making room for the next must not drop it
            answer.slots.append(slot)
            answer.tiers.append(tier)
        return answer

    def prefetch(self, wanted: Wanted, within_ms: float, *, own: bool = False) -> list[Load]:
        """Return loads for those of the names that are held below only, in order.

        `own`: for another node, from the tiers of this one; its names need not be a prefix.
        """
        answer = Pending()
        budget: dict[TierKind, int] = {}
        for index, key in enumerate(wanted.keys):
            if key in self._reserver.table.index:
                continue
            started = self._start(wanted, index, within_ms, budget, answer, own=own)
            if started is None and (answer.reason is not MissReason.NONE or not own):
                break
        return answer.loads

    def loading(self, slot: int) -> bool:
        """Say whether a reserved slot is being filled from below."""
        return slot in self._from

    def goes_on(self, slot: int, tier: TierKind) -> None:
        """Take note that a slot is filled from another tier than before."""
        self._from[slot] = tier

    def forget(self, root_number: int | None) -> None:
        """Let what is on its way under a root (None: any) not count when it arrives."""
        table = self._reserver.table
        self._unwanted |= {
            slot for slot in self._from if root_number in (None, table.root_number[slot])
        }

    def wants(self, slot: int) -> bool:
        """Say whether a slot's block is still wanted."""
        return slot not in self._unwanted

    def settled(self, slot: int) -> None:
        """Take note that the loader is done with a slot, whatever it came to."""
        del self._from[slot]
        self._unwanted.discard(slot)
        self._reserver.unreserve(self.loader, slot)

    def _start(
        self,
        wanted: Wanted,
        index: int,
        within_ms: float,
        budget: dict[TierKind, int],
        answer: Pending,
        *,
        own: bool = False,
    ) -> TierKind | None:
        """Reserve a slot and add a load for one block; None where it stays below or is nowhere."""
        info = wanted.info
        tier = self._below.holder(info.root, BlockName(wanted.name(index)), own=own)
        if tier is None:
            return None
        if tier not in budget:
            budget[tier] = self._below.loadable_bytes(tier, within_ms)
        block_bytes = info.shape.block_bytes
        quota = self._reserver.quota_bytes - self.loader.reserved_bytes
        if min(budget[tier], quota) < block_bytes:
            answer.reason = MissReason.LATE
            return None
        missing = min(budget[tier], quota) // block_bytes
        if not self._reserver.keeps_quota(self.loader, wanted, index, missing):
            answer.reason = MissReason.QUOTA
            return None
        slot = self._reserver.reserve_one(self.loader, wanted, index, missing)
        if slot is None:
            answer.reason = MissReason.REFUSED
            return None
        budget[tier] -= block_bytes
        generation = self._reserver.table.generation[slot]
        self._from[slot] = tier
        answer.loads.append(Load(slot, generation, tier, block_bytes))
        return tier
