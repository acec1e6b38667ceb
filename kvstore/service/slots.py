"""The node's picture of its arena: slot states in columns, the index, eviction. Pure.

Every change of a slot goes through `SlotTable`, which keeps four things in step: the word in shared
memory (through `SlotWord.to`, so an illegal change asserts), the columns here, the index
(key → slot) and what is published. No object per block: arrays by slot number, and one dict of
64-bit keys. A key is a hint, the record's full root and name decide (`holds`).

    RESERVED slots may stand in the index too: the claim of whoever computes that block now.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.core.limits import NAME_BYTES
from kvstore.core.names import BlockName
from kvstore.core.outcomes import MissReason
from kvstore.core.slots import READABLE, SlotState, SlotWord, may_turn, pack_word, pack_words
from kvstore.directory.events import Changed, TierKind
from kvstore.directory.policy import BlockKey, Policy
from kvstore.directory.publisher import Publisher
from kvstore.observe.metrics import NodeMetrics
from kvstore.service.insertions import Insertions
from kvstore.service.roots import RootInfo, Roots
from kvstore.tiers.arena_space import ArenaSpace, Chunk
from kvstore.tiers.quotas import Quotas
from kvstore.transport.arena import ArenaMapping

_BULK_LEAST: Final = 64
"""Slots from which on numpy is cheaper than a loop."""
_FEW: Final = 16
"""Slots below which reading the columns one by one is cheaper than numpy."""
_ONE: Final = np.uint32(1)
_PINS_MAX: Final = 1 << 31
_FREE, _RESERVED, _COMMITTED, _SEALED, _DRAINING = map(int, SlotState)


class SlotTable:
    """Slots of one arena, as the only process that may change them sees them."""

    def __init__(
        self,
        arena: ArenaMapping,
        policy: Policy,
        metrics: NodeMetrics,
        *,
        node: str,
        host: str = "",
        tiers: Sequence[TierKind] = (TierKind.DRAM,),
        quotas: Quotas | None = None,
    ) -> None:
        """`tiers` are what the node publishes: DRAM, and what lies below it."""
        slots = arena.size.max_slots
        self.arena = arena
        self.metrics = metrics
        self.space = ArenaSpace(arena.size.data_bytes, slots)
        self.quotas = quotas or Quotas()
        self.book = self.quotas.book("dram")
        """Used and reserved bytes by root and share domain."""
        self.roots = Roots(on_domain=self.quotas.opened)
        self.index: dict[int, int] = {}
        self.outdone: set[int] = set()
        """Reserved slots whose block another was reserved for later: `index` may not know them."""
        self.generation = array("Q", bytes(8 * slots))
        self.state = bytearray(slots)
        self.servable = bytearray(slots)
        """1 where the block may be leased: readable, and verified since the node started."""
        self.granules = array("I", bytes(4 * slots))
        self.pins = array("I", bytes(4 * slots))
        """Leases and running jobs that need the bytes to stay."""
        self.root_number = array("I", bytes(4 * slots))
        self.key: NDArray[np.object_] = np.zeros(slots, np.object_)
        """The very integers of `index`, for the policy to index by too: others would take 32 bytes
        each. Not a list: the collector of garbage would walk it."""
        self.parent = array("Q", bytes(8 * slots))
        """Key of the block before it in its prompt; 0 at the start or where it is not known."""
        self.insertions = Insertions(policy, self.key, self.parent)
        self.writer = array("I", bytes(4 * slots))
        """Session that reserved the slot last; 0 when that was before this incarnation."""
        self.claimed_ms = array("d", bytes(8 * slots))
        self.bypass = True
        """Whether the policy may keep newcomers out. Not where tiers lie below: the arena is the
        only way into them (docs/decisions/0003-bypass-only-at-the-bottom.md)."""
        self.counts = [0] * (max(SlotState) + 1)
        """Slots by state; FREE counts down from zero."""
        self.used_bytes = 0
        self.reserved_bytes = 0
        self.evicted_blocks = 0
        self.refusal = MissReason.REFUSED  # why `make_room` found none the last time
        self.publisher = Publisher(node, arena.incarnation, tiers, self, host=host)

    @property
    def policy(self) -> Policy:
        """What orders the blocks here, told of all of them."""
        return self.insertions.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self.insertions.policy = policy

    # -- looking ---------------------------------------------------------------------------

    def root_of(self, slot: int) -> RootInfo:
        """Return the root that the slot's block stands under."""
        return self.roots.at(self.root_number[slot])

    def holds(self, slot: int, info: RootInfo, name: bytes) -> bool:
        """Say whether the slot is for exactly this block: the whole name, not its key."""
        return self.root_number[slot] == info.number and self.arena.name(slot) == name

    def find(self, info: RootInfo, key: int, name: bytes) -> int | None:
        """Return the slot that holds or will hold the block, or None."""
        slot = self.index.get(key)
        return None if slot is None or not self.holds(slot, info, name) else slot

    def scan(self, cursor: int, limit: int) -> tuple[list[Changed], int | None]:
        """Return what sealed slots from `cursor` on hold: a slice of a Watch snapshot."""
        stop = min(cursor + limit, len(self.state))
        states = np.frombuffer(self.state, np.uint8)[cursor:stop]
        changes = [
            Changed(
                root=info.root,
                tier=TierKind.DRAM,
                names=names,
                block_bytes=info.shape.block_bytes,
                group=info.group,
            )
            for info, names in self._by_root(cursor + np.flatnonzero(states == _SEALED))
        ]
        return changes, stop if stop < len(self.state) else None

    def _by_root(self, at: NDArray[np.int64]) -> Iterator[tuple[RootInfo, list[BlockName]]]:
        """Yield the names of the blocks in slots, root by root."""
        packed = self.arena.names(at)
        names = [BlockName(packed[n : n + NAME_BYTES]) for n in range(0, len(packed), NAME_BYTES)]
        numbers = np.frombuffer(self.root_number, np.uint32)[at]
        for number in np.unique(numbers).tolist():
            yield self.roots.at(number), list(compress(names, (numbers == number).tolist()))

    # -- the life of a slot ----------------------------------------------------------------

    def reserve(
        self,
        info: RootInfo,
        name: bytes,
        key: int,
        *,
        parent: int,
        position: int,
        session: int,
        now_ms: float,
    ) -> int | None:
        """Give a free slot to a session for one block; None when there is no free slot.

        The caller makes room first (`make_room`) and has checked that nobody holds the block.
        """
        slot = self._place(info.shape.block_bytes)
        if slot is None:
            return None
        # The record first: whoever sees the new generation may trust what stands beside it.
        self.arena.write_record(
            slot, self.granules[slot], info.shape.sizes, position, info.root, name
        )
        self.root_number[slot] = info.number
        self.key[slot] = key
        self.parent[slot] = parent
        self.writer[slot] = session
        self.claimed_ms[slot] = now_ms
        self._turn(slot, _RESERVED, session)
        self.outdone.discard(slot)
        self._claim(key, slot)
        self.reserved_bytes += info.shape.block_bytes
        self.book.add(info.root, info.shape.block_bytes)
        return slot

    def _claim(self, key: int, slot: int) -> None:
        """Let `slot` stand for `key`, whoever did before."""
        holder = self.index.setdefault(key, slot)
        if holder != slot:
            self.outdone.add(holder)
            self.index[key] = slot

    def commit(self, slot: int) -> bool:
        """Make a reserved slot readable; False when its name was committed before: slot freed.

        The caller tells the policy of what it committed (`insertions`).
        """
        holder = self.index.get(key := self.key[slot])
        if holder != slot:
            if holder is not None and SlotState(self.state[holder]) in READABLE:
                self.free(slot)
                return False
            self._claim(key, slot)
        self._turn(slot, _COMMITTED)
        self.servable[slot] = 1
        block_bytes = self.root_of(slot).shape.block_bytes
        self.reserved_bytes -= block_bytes
        self.used_bytes += block_bytes
        return True

    def seal(self, slots: Sequence[int], sums: Sequence[bytes]) -> None:
        """Store the sums of committed slots and list their blocks to others."""
        at = np.asarray(slots, np.int64)
        self.arena.set_sums(at, b"".join(sums))
        self.turn_all(at, _COMMITTED, _SEALED)
        for info, names in self._by_root(at):
            self.publisher.set(
                info.root, TierKind.DRAM, names,
                block_bytes=info.shape.block_bytes, group=info.group,
            )  # fmt: skip

    def free(self, slot: int) -> None:
        """Take a slot back from whatever state it is in; nobody may need its bytes any more."""
        state = SlotState(self.state[slot])
        assert self.pins[slot] == 0, f"slot {slot} is pinned"
        key, info = self.key[slot], self.root_of(slot)
        if state is SlotState.SEALED:
            name = BlockName(self.arena.name(slot))
            self.publisher.delete(info.root, TierKind.DRAM, [name], group=info.group)
        if state is not SlotState.DRAINING:
            self.book.add(info.root, -info.shape.block_bytes)
        if state in READABLE:
            self.used_bytes -= info.shape.block_bytes
            self.policy.remove(BlockKey(key))
        elif state is SlotState.RESERVED:
            self.reserved_bytes -= info.shape.block_bytes
        if self.index.get(key) == slot:
            del self.index[key]
        self.servable[slot] = 0
        self._turn(slot, _FREE)
        self.space.give(slot)

    def pin(self, slots: Sequence[int]) -> None:
        """Keep the bytes of slots until as many `unpin`s."""
        if len(slots) < _BULK_LEAST:
            for slot in slots:
                self.pins[slot] += 1
            return
        np.add.at(np.frombuffer(self.pins, np.uint32), np.asarray(slots, np.int64), _ONE)

    def unpin(self, slots: Sequence[int]) -> None:
        """End pins; a slot that was only waiting for that is free now."""
        if len(slots) < _BULK_LEAST or self.counts[_DRAINING]:
            for slot in slots:
                self.pins[slot] -= 1
                if not self.pins[slot] and self.state[slot] == _DRAINING:
                    self.free(slot)
            return
        at, pins = np.asarray(slots, np.int64), np.frombuffer(self.pins, np.uint32)
        np.subtract.at(pins, at, _ONE)
        assert (pins[at] < _PINS_MAX).all(), "unpinned more often than pinned"

    def places(self, slots: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the offsets, in granules, and the generations of slots."""
        if len(slots) < _FEW:
            return [self.granules[slot] for slot in slots], [
                self.generation[slot] for slot in slots
            ]
        at = np.asarray(slots, np.int64)
        return (
            np.frombuffer(self.granules, np.uint32)[at].tolist(),
            np.frombuffer(self.generation, np.uint64)[at].tolist(),
        )

    def give_up(self, slot: int) -> None:
        """End a reservation whose block will not come; while somebody needs the bytes it drains.

        Readers that wait for the slot see the state and stop; a device may still write into it.
        """
        assert self.state[slot] == SlotState.RESERVED
        if not self.pins[slot]:
            return self.free(slot)
        if self.index.get(self.key[slot]) == slot:
            del self.index[self.key[slot]]
        info = self.root_of(slot)
        self.reserved_bytes -= info.shape.block_bytes
        self.book.add(info.root, -info.shape.block_bytes)
        self._turn(slot, _DRAINING)

    def drop(self, slot: int, *, reason: str) -> None:
        """Forget a readable block at once. Who holds a lease on it sees that it is void."""
        if not self.pins[slot]:
            self.evict([slot], reason=reason)
            return
        info, key = self.root_of(slot), self.key[slot]
        if self.state[slot] == _SEALED:
            name = BlockName(self.arena.name(slot))
            self.publisher.delete(info.root, TierKind.DRAM, [name], group=info.group)
        self.used_bytes -= info.shape.block_bytes
        self.book.add(info.root, -info.shape.block_bytes)
        self.policy.remove(BlockKey(key))
        if self.index.get(key) == slot:
            del self.index[key]
        self.servable[slot] = 0
        self._turn(slot, _DRAINING)
        self.metrics.evictions.labels("dram", reason).inc()
        self.evicted_blocks += 1

    def adopt(self, slot: int, word: SlotWord, info: RootInfo, key: int, now_ms: float) -> None:
        """Take over a sealed or reserved slot that an earlier incarnation left.

        A sealed block is not servable until it was verified, and the caller publishes it.
        """
        assert word.state in (SlotState.SEALED, SlotState.RESERVED)
        self.state[slot] = word.state
        self.root_number[slot] = info.number
        self.key[slot] = key
        self.parent[slot] = 0
        self.writer[slot] = word.session
        self.claimed_ms[slot] = now_ms
        self._claim(key, slot)
        self.counts[_FREE] -= 1
        self.counts[word.state] += 1
        self.book.add(info.root, info.shape.block_bytes)
        if word.state is SlotState.RESERVED:
            self.reserved_bytes += info.shape.block_bytes
            return
        self.used_bytes += info.shape.block_bytes
        self.policy.insert([BlockKey(key)], parent=None, now_ms=now_ms)

    # -- room ------------------------------------------------------------------------------

    def evict(self, slots: Iterable[int], *, reason: str) -> int:
        """Drop sealed, unpinned blocks; returns how many."""
        dropped = list(slots)
        for slot in dropped:
            self.free(slot)
        self.metrics.evictions.labels("dram", reason).inc(len(dropped))
        self.evicted_blocks += len(dropped)
        return len(dropped)

    def idle(self, slot: int) -> bool:
        """Say whether a block may be evicted at this moment."""
        return self.state[slot] == SlotState.SEALED and not self.pins[slot]

    def _place(self, block_bytes: int) -> int | None:
        slot = self.space.take(block_bytes)
        if slot is None:
            chunk = self.space.grow(block_bytes)
            if chunk is None:
                return None
            self._lay(chunk)
            slot = self.space.take(block_bytes)
        return slot

    def _lay(self, chunk: Chunk) -> None:
        """Write where each slot of a new chunk lies, so that a restart finds the chunk again."""
        for index, slot in enumerate(chunk.slots):
            offset = chunk.extent.start + index * chunk.block_bytes
            self.granules[slot] = offset >> 12
            self.arena.lay(slot, offset, chunk.block_bytes)

    def _turn(self, slot: int, state: int, session: int = 0) -> None:
        """Change a slot's state, here and in shared memory; a reservation bumps the generation."""
        before = self.state[slot]
        assert may_turn(before, state), f"slot {slot}: {before} -> {state}"
        assert (session != 0) == (state == _RESERVED), "only a reservation has a session"
        generation = self.generation[slot]
        if state == _RESERVED:
            generation += 1
            self.generation[slot] = generation
        self.arena.slot_words[slot] = pack_word(generation, state, session)
        self.state[slot] = state
        self.counts[before] -= 1
        self.counts[state] += 1

    def turn_all(self, at: NDArray[np.int64], before: int, after: int) -> None:
        """Change the state of many slots that all stand in one, none of them to RESERVED."""
        states = np.frombuffer(self.state, np.uint8)
        assert may_turn(before, after) and after != _RESERVED, f"{before} -> {after}"
        assert (states[at] == before).all(), f"one of the slots is not {SlotState(before).name}"
        self.arena.set_words(at, pack_words(np.frombuffer(self.generation, np.uint64)[at], after))
        states[at] = after
        self.counts[before] -= len(at)
        self.counts[after] += len(at)
