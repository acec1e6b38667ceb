"""What a trace is to the simulator: requests in order of time, each a path of prefix blocks.

Readers of files stand in `kvstore.simulate.formats`; this module knows none of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.errors import BadInput
from kvstore.directory.policy import BlockKey

_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: a prompt cut in blocks, named by prefix, and what the caller told about it."""

    timestamp_ms: float
    input_tokens: int
    output_tokens: int
    blocks: list[BlockKey]
    """Prefix nodes from the root on: equal keys stand for equal whole prefixes."""
    session: str = ""
    turn: int = 0
    """1 for the first request of a session; 0 where the trace does not tell."""
    kind: str = ""
    first_block: int = 0
    """Position of `blocks[0]` in its prompt: above 0 where a tier above had the blocks before."""

    def is_partial(self, block_tokens: int) -> bool:
        """Say whether the last block is not full."""
        return self.input_tokens < block_tokens * (self.first_block + len(self.blocks))


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests sorted by time, with what has to be known of all of them."""

    name: str
    block_tokens: int
    """Tokens of a full block; the last block of a request may have fewer."""
    requests: list[TraceRequest]
    unique_blocks: int = field(init=False)
    input_tokens: int = field(init=False)
    block_refs: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.requests:
            raise BadInput(f"trace {self.name} has no requests")
        if self.block_tokens <= 0:
            raise BadInput(f"trace {self.name}: {self.block_tokens} tokens a block")
        unique = {block for request in self.requests for block in request.blocks}
        object.__setattr__(self, "unique_blocks", len(unique))
        object.__setattr__(self, "input_tokens", sum(r.input_tokens for r in self.requests))
        object.__setattr__(self, "block_refs", sum(len(r.blocks) for r in self.requests))

    def capacity(self, fraction: float) -> int:
        """Return how many blocks a share of the trace's unique blocks is; at least one.

        Raises `BadInput` for a fraction outside (0, 1].
        """
        if not 0 < fraction <= 1:
            raise BadInput(f"fraction {fraction} is not above 0 and at most 1")
        return max(1, round(fraction * self.unique_blocks))


class KeyMaker:
    """Turns a trace's ids into keys as good as production's, one int object per block.

    Dense ids have structure (neighbours share prefixes) that 64 bits of a hash have not; a policy
    that samples by bits of the key would see it. The mix is the finaliser of SplitMix64 (Steele,
    Lea and Flood 2014), a bijection of 64 bits, so no two blocks collide.
    """

    def __init__(self) -> None:
        self._keys: dict[int, BlockKey] = {}

    def keys(self, ids: Iterable[int]) -> list[BlockKey]:
        """Return the keys of `ids`, in order."""
        known = self._keys
        keys: list[BlockKey] = []
        for number in ids:
            key = known.get(number)
            if key is None:
                key = known[number] = mixed(number)
            keys.append(key)
        return keys


def mixed(number: int) -> BlockKey:
    """Return 64 well-mixed bits of the low 64 bits of `number`."""
    word = (number + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return BlockKey(word ^ (word >> 31))


def block_tokens_of(requests: Iterable[TraceRequest], where: str) -> int:
    """Return the tokens of a block that the lengths of all requests agree with.

    A request of n blocks and L tokens says L/n <= B < L/(n-1). The smallest power of two that
    all allow is the answer; raises `BadInput` where there is none, or only one-block requests.
    """
    least, below = 1, 1 << 20
    for request in requests:
        count = len(request.blocks)
        if count:
            least = max(least, -(-request.input_tokens // count))
        if count > 1:
            below = min(below, -(-request.input_tokens // (count - 1)))
    found = [size for size in (1 << power for power in range(20)) if least <= size < below]
    if not found or below == 1 << 20:
        raise BadInput(
            f"{where}: tokens per block do not follow from its lengths "
            f"(at least {least}, below {below}); say --block-tokens"
        )
    return found[0]
