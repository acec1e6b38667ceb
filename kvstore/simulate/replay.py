"""Replays a trace through one tier under a production `Policy` object.

What counts as a hit, and the order in which the policy learns of it, per request:

1. The hit is the longest prefix of which every block is held.
2. The policy is told of the request (`request`).
3. Missing blocks are taken from the root on. Where the tier is full, one call of `victims` says for
   which of them others should go, again from the root on: a suffix without its prefix can never
   be hit. Blocks of the request itself are leased meanwhile.
4. The admitted ones are inserted, one call for each unbroken run.
"""

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, NamedTuple

from kvstore.directory.policy import BlockKey, Policy, Prompt
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

    def __init__(
        self, policy: Policy, capacity_blocks: int, *, block_bytes: int, bypass: bool = True
    ) -> None:
        """`bypass`: whether the policy may keep newcomers out. Not where a tier lies below."""
        assert capacity_blocks > 0 and not len(policy)
        self.bypass = bypass
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

    def serve(
        self,
        request: TraceRequest,
        missing: Sequence[int],
        *,
        partial: bool = False,
        hints: bool = True,
    ) -> Moved:
        """Take in a request of which the blocks at `missing` (places, root first) are not held.

        `partial` says that its last block is not full.
        """
        self.hear(request, partial=partial, hints=hints)
        if not missing:
            return _NOTHING
        moved = self._make_room(request, missing)
        self._insert(request, moved.admitted)
        return moved

    def hear(self, request: TraceRequest, *, partial: bool = False, hints: bool = True) -> None:
        """Tell the policy of a request."""
        self.policy.request(
            Prompt(
                keys=array("Q", request.blocks),
                now_ms=request.timestamp_ms,
                first_block=request.first_block,
                block_bytes=self.block_bytes,
                partial=partial,
                kind=request.kind if hints else "",
            )
        )

    def _make_room(self, request: TraceRequest, missing: Sequence[int]) -> Moved:
        """Choose which places of `missing` are admitted; drop others for them."""
        blocks = request.blocks
        free = self.capacity_blocks - len(self.held)
        wanted = missing[free : self.capacity_blocks]
        if not wanted:
            return Moved(list(missing[:free]), [])
        victims = self.drop(
            len(wanted),
            request.timestamp_ms,
            leased=set(blocks),
            newcomers=[blocks[index] for index in wanted],
        )
        return Moved(list(missing[: free + len(victims)]), victims)

    def _insert(self, request: TraceRequest, admitted: Sequence[int]) -> None:
        blocks, start = request.blocks, 0
        for stop in range(1, len(admitted) + 1):
            if stop < len(admitted) and admitted[stop] == admitted[stop - 1] + 1:
                continue
            first, last = admitted[start], admitted[stop - 1]
            self.policy.insert(
                blocks[first : last + 1],
                parent=blocks[first - 1] if first else None,
                now_ms=request.timestamp_ms,
            )
            self.held.update(blocks[first : last + 1])
            start = stop

    def put(
        self, blocks: Sequence[BlockKey], parents: Mapping[BlockKey, BlockKey | None], now_ms: float
    ) -> tuple[list[BlockKey], list[BlockKey]]:
        """Take blocks from a tier above, suffixes first; returns (admitted, dropped).

        Blocks that are held already are left as they are and count as neither. `parents` says
        which block stands before each.
        """
        new = [block for block in reversed(blocks) if block not in self.held]
        admitted = new[: self.capacity_blocks]
        wanted = admitted[self.capacity_blocks - len(self.held) :]
        dropped: list[BlockKey] = []
        if wanted:
            dropped = self.drop(len(wanted), now_ms, leased=set(admitted), newcomers=wanted)
            del admitted[len(admitted) - len(wanted) + len(dropped) :]
        for block in admitted:
            self.policy.insert([block], parent=parents[block], now_ms=now_ms)
            self.held.add(block)
        return admitted, dropped

    def drop(
        self,
        count: int,
        now_ms: float,
        *,
        leased: AbstractSet[BlockKey],
        newcomers: Sequence[BlockKey] = (),
    ) -> list[BlockKey]:
        """Drop at most `count` blocks that are not leased, worst first; returns them.

        For `newcomers` only those that the policy thinks worth less, where it may bypass.
        """
        victims = self.policy.victims(
            count,
            now_ms=now_ms,
            may_evict=lambda block: block not in leased,
            newcomers=newcomers if self.bypass else (),
        )
        for victim in victims:
            self.held.remove(victim)
            self.policy.remove(victim)
        return victims


def replay(
    trace: Trace,
    policy: Policy,
    capacity_blocks: int,
    *,
    hints: bool = True,
    on_request: Callable[[], None] | None = None,
) -> ReplayResult:
    """Replay `trace` through an empty `policy` with room for `capacity_blocks`.

    `hints` false leaves out what only a caller can tell (the request's type), as engines do that
    know nothing of it.
    """
    tier = PolicyTier(policy, capacity_blocks, block_bytes=trace.block_tokens * BYTES_PER_TOKEN)
    tally = Tally(trace)
    for request in trace.requests:
        blocks, held = request.blocks, tier.held
        found = tier.prefix(blocks)
        missing = [index for index in range(found, len(blocks)) if blocks[index] not in held]
        partial = request.is_partial(trace.block_tokens)
        moved = tier.serve(request, missing, partial=partial, hints=hints)
        tally.count(request, found, written=len(moved.admitted))
        if on_request is not None:
            on_request()
    return tally.result(policy.name, capacity_blocks)
