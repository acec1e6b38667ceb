"""The exact optimum: Belady's rule with bypass, over prefix blocks.

After each request the tier keeps, of all blocks it holds or just saw, those whose next use is
nearest, and never writes one that is not used again. A block's next use is never later than its
children's, and among equal ones the deepest goes first, so what is kept is closed under prefixes
by itself; hence the block hits are exactly the best any policy can have (Belady 1966; with
bypass, Mattson et al. 1970).
"""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Final

from kvstore.core.limits import MAX_NAMES_PER_CALL
from kvstore.directory.policy import BlockKey
from kvstore.simulate.replay import ReplayResult, Tally
from kvstore.simulate.trace import Trace

_PLACE_BITS: Final = MAX_NAMES_PER_CALL.bit_length()
_PLACE_MASK: Final = (1 << _PLACE_BITS) - 1


def replay_optimum(
    trace: Trace, capacity_blocks: int, *, on_request: Callable[[], None] | None = None
) -> ReplayResult:
    """Return what the optimum reaches on `trace` in `capacity_blocks`."""
    assert capacity_blocks > 0
    requests = trace.requests
    following = _next_uses(trace)
    held: dict[BlockKey, int] = {}
    # Entries are next uses, negative for the farthest first: a place in a request, which names the
    # block. An entry is stale when its block's next use is another by now.
    farthest: list[int] = []
    tally = Tally(trace)
    for request, uses in zip(requests, following, strict=True):
        blocks = request.blocks
        found = len(blocks)
        fresh: set[BlockKey] = set()
        for position, block in enumerate(blocks):
            if block not in held:
                found = min(found, position)
                fresh.add(block)
            use = uses[position]
            if use < 0:
                held.pop(block, None)
                fresh.discard(block)
            else:
                held[block] = use
                heappush(farthest, -use)
        while len(held) > capacity_blocks:
            use = -heappop(farthest)
            block = requests[use >> _PLACE_BITS].blocks[use & _PLACE_MASK]
            if held.get(block) == use:
                del held[block]
                fresh.discard(block)
        tally.count(request, found, written=len(fresh))
        if on_request is not None:
            on_request()
    return tally.result("opt", capacity_blocks)


def _next_uses(trace: Trace) -> list[list[int]]:
    """Return, for each block of each request, where it is used next or -1.

    A use is (number of the request, place in it) in one integer, so later and deeper is greater.
    """
    later: dict[BlockKey, int] = {}
    following: list[list[int]] = [[]] * len(trace.requests)
    for number in range(len(trace.requests) - 1, -1, -1):
        blocks = trace.requests[number].blocks
        following[number] = [later.get(block, -1) for block in blocks]
        first = number << _PLACE_BITS
        later.update(zip(blocks, range(first, first + len(blocks)), strict=True))
    return following
