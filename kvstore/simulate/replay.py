"""Replays a trace through one tier under a production `Policy` object.

What counts as a hit, and the order in which the policy learns of it, per request:

1. The hit is the longest prefix of which every block is held.
2. Missing blocks are taken from the root on. Where the tier is full, `admit` is asked for each,
   and the first refusal ends the run: a suffix without its prefix can never be hit. Room for all
   of them is made by one call of `victims`; blocks of the request itself are leased meanwhile.
3. The admitted ones are inserted from the end to the start, then those that were held are touched
   from the end to the start: a prefix is always more recent than its suffixes.
"""

import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Final, NamedTuple

from kvstore.directory.policy import Access, BlockKey, Policy
from kvstore.simulate.trace import Trace, TraceRequest

BYTES_PER_TOKEN: Final = 128 << 10
"""KV of one token of an 8-billion-parameter model with grouped heads, in 16 bits."""


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What one policy made of one trace at one capacity."""

    policy: str
    capacity_blocks: int
    token_hit: float
    """Share of all prompt tokens that were hit, 0 to 1."""
    block_hit: float
    """Share of all references to blocks that were hit, 0 to 1."""
    writes_per_request: float
    """Blocks newly written into the tier, per request."""
    seconds: float
    """Wall time of the replay."""


class Tally:
    """Counts of one replay."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._tokens = 0
        self._blocks = 0
        self._written = 0
        self._began = time.perf_counter()

    def count(self, request: TraceRequest, found: int, *, written: int) -> None:
        """Add a request of which the first `found` blocks were hit."""
        self._tokens += min(found * self._trace.block_tokens, request.input_tokens)
        self._blocks += found
        self._written += written

    def result(self, policy: str, capacity_blocks: int) -> ReplayResult:
        """Return the shares."""
        trace = self._trace
        return ReplayResult(
            policy=policy,
            capacity_blocks=capacity_blocks,
            token_hit=self._tokens / max(1, trace.input_tokens),
            block_hit=self._blocks / max(1, trace.block_refs),
            writes_per_request=self._written / len(trace.requests),
            seconds=time.perf_counter() - self._began,
        )


class Moved(NamedTuple):
    """What one request changed in a tier."""

    admitted: list[int]
    """Places in the request, root first, of the blocks now held that were not."""
    victims: list[BlockKey]
    """Blocks dropped for them, in the order chosen."""


_NOTHING: Final = Moved([], [])


class PolicyTier:
    """One tier of equal slots whose content a `Policy` decides: an arena without bytes."""

    def __init__(self, policy: Policy, capacity_blocks: int, *, block_bytes: int) -> None:
        assert capacity_blocks > 0 and not len(policy)
        self.policy = policy
        self.capacity_blocks = capacity_blocks
        self.block_bytes = block_bytes
        self.held: set[BlockKey] = set()

    def prefix(self, blocks: list[BlockKey]) -> int:
        """Return how many blocks from the root on are held without a gap."""
        held = self.held
        for position, block in enumerate(blocks):
            if block not in held:
                return position
        return len(blocks)

    def serve(self, request: TraceRequest, missing: Sequence[int], *, hints: bool = True) -> Moved:
        """Take in a request: insert what is at `missing` (places, root first), touch what is held.

        Blocks at `missing` are not held.
        """
        blocks, held = request.blocks, self.held
        accesses = _accesses(request, self.block_bytes, hints=hints)
        moved = self._make_room(request, missing, accesses) if missing else _NOTHING
        insert, touch = self.policy.insert, self.policy.touch
        for index in reversed(moved.admitted):
            insert(blocks[index], accesses[index])
        for block, access in zip(reversed(blocks), reversed(accesses), strict=True):
            if block in held:
                touch(block, access)
        held.update(blocks[index] for index in moved.admitted)
        return moved

    def _make_room(
        self, request: TraceRequest, missing: Sequence[int], accesses: Sequence[Access]
    ) -> Moved:
        """Choose which places of `missing` are admitted; drop others for them."""
        blocks, admit = request.blocks, self.policy.admit
        free = self.capacity_blocks - len(self.held)
        admitted = list(missing[:free])
        for index in missing[free : self.capacity_blocks]:
            if not admit(blocks[index], accesses[index]):
                break
            admitted.append(index)
        if len(admitted) <= free:
            return Moved(admitted, [])
        victims = self.drop(len(admitted) - free, request.timestamp_ms, leased=set(blocks))
        del admitted[free + len(victims) :]
        return Moved(admitted, victims)

    def put(
        self, blocks: Sequence[tuple[BlockKey, Access]]
    ) -> tuple[list[BlockKey], list[BlockKey]]:
        """Take blocks from a tier above, least valuable first; returns (admitted, dropped).

        Blocks that are held already are left as they are and count as neither.
        """
        free = self.capacity_blocks - len(self.held)
        admitted: list[tuple[BlockKey, Access]] = []
        for block, access in reversed(blocks):
            if block in self.held or len(admitted) == self.capacity_blocks:
                continue
            if len(admitted) < free or self.policy.admit(block, access):
                admitted.append((block, access))
        dropped: list[BlockKey] = []
        if len(admitted) > free:
            names = {block for block, _ in admitted}
            now_ms = admitted[0][1].now_ms
            dropped = self.drop(len(admitted) - free, now_ms, leased=names)
            del admitted[free + len(dropped) :]
        for block, access in reversed(admitted):
            self.policy.insert(block, access)
            self.held.add(block)
        return [block for block, _ in admitted], dropped

    def drop(self, count: int, now_ms: float, *, leased: AbstractSet[BlockKey]) -> list[BlockKey]:
        """Drop at most `count` blocks that are not leased, worst first; returns them."""
        victims = self.policy.victims(
            count, now_ms=now_ms, may_evict=lambda block: block not in leased
        )
        for victim in victims:
            self.held.remove(victim)
            self.policy.remove(victim)
        return victims


def _accesses(request: TraceRequest, block_bytes: int, *, hints: bool) -> list[Access]:
    """Return the evidence of every block of a request.

    Made by iterators alone: a call of `Access` for each block would cost more than all the rest.
    """
    blocks = request.blocks
    first = request.first_block
    evidence = [
        repeat(request.timestamp_ms),
        range(first, first + len(blocks)),
        repeat(block_bytes),
        chain((None,), blocks),
        repeat(""),
        repeat(request.session if hints else ""),
        repeat(request.turn if hints else 0),
        repeat(hints and request.turn > 1),
        repeat(request.kind if hints else ""),
    ]
    return list(map(tuple.__new__, repeat(Access), zip(*evidence, strict=False)))


def replay(
    trace: Trace,
    policy: Policy,
    capacity_blocks: int,
    *,
    hints: bool = True,
    on_request: Callable[[], None] | None = None,
) -> ReplayResult:
    """Replay `trace` through an empty `policy` with room for `capacity_blocks`.

    `hints` false leaves out what only a caller can tell (session, turn, type), as engines do that
    know nothing of conversations.
    """
    tier = PolicyTier(policy, capacity_blocks, block_bytes=trace.block_tokens * BYTES_PER_TOKEN)
    tally = Tally(trace)
    for request in trace.requests:
        blocks, held = request.blocks, tier.held
        found = tier.prefix(blocks)
        missing = [index for index in range(found, len(blocks)) if blocks[index] not in held]
        moved = tier.serve(request, missing, hints=hints)
        tally.count(request, found, written=len(moved.admitted))
        if on_request is not None:
            on_request()
    return tally.result(policy.name, capacity_blocks)
