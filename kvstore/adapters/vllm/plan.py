"""What to load and what to store for a request: pure decisions, in the engine's blocks.

prompt   |---- local hit ----|---- external hit ----|---- computed ----|
engine blocks of B tokens; at least one token is left to compute
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import BlockName

_IDLE_PATIENCE_NS: Final = 10_000_000
_BUSY_PATIENCE_NS: Final = 3_000_000
_SHORTEST_NS: Final = 300_000
"""An answer hardly takes less (about 1 ms is usual): a shorter wait is for nothing."""
_COST_OF_GAIN: Final = 8
"""A wait costs at most one part in so many of what it may save."""


def patience_ns(*, running: int, step_ns: int) -> int:
    """Return how long the scheduler may wait for answers in one step.

    Without an answer a request loses a step, `step_ns`; a wait keeps `running` requests from going
    on. Waiting pays while `running` times the wait is well below a step. With nothing running
    nobody is kept waiting; the bound is for a node that hangs.
    """
    if not running:
        return _IDLE_PATIENCE_NS
    most = min(step_ns // (_COST_OF_GAIN * running), _BUSY_PATIENCE_NS)
    return most if most >= _SHORTEST_NS else 0


def usable_hit(
    found_blocks: int, *, prompt_tokens: int, local_tokens: int, block_tokens: int, least: int
) -> int:
    """Return how many tokens past the local hit to load, a multiple of the engine's block.

    `found_blocks` counts blocks of 16 from the prompt's start. One token is always left to compute;
    a gain below `least` tokens is none.
    """
    found = found_blocks * BLOCK_TOKENS // block_tokens
    most = (prompt_tokens - 1) // block_tokens
    gain = min(found, most) * block_tokens - local_tokens
    return gain if gain >= max(1, least) else 0


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Blocks to load for one request: `names` fill `blocks` in order, `ratio` names each."""

    request: str
    names: Sequence[BlockName]
    blocks: Sequence[int]
    first: int
    """Position of the first engine block in the prompt."""


@dataclass(frozen=True, slots=True)
class StoreJob:
    """Full blocks to store once the step is done; as `LoadJob`."""

    request: str
    names: Sequence[BlockName]
    blocks: Sequence[int]
    first: int


@dataclass(slots=True)
class RequestState:
    """What the scheduler side remembers about one request of the engine."""

    names: list[BlockName] = field(default_factory=list)
    """Of the blocks named so far, from the start."""
    asked_from: int = 0
    """Local hit at the last question, in tokens."""
    stored: int = 0
    """Engine blocks, from the start, that the node has or was sent."""
    loading: frozenset[int] = frozenset()
    """Engine's ids of the blocks being loaded."""
    gave_up: bool = False
    """A load failed: it would fail again. Computed instead."""
    stores: int = 0
    """Store jobs handed to the worker."""


def blocks_to_store(
    state: RequestState, *, computed_tokens: int, known_tokens: int, block_tokens: int
) -> range:
    """Return the engine blocks that are full after this step and were not stored yet.

    `known_tokens` bounds it: a drafted token that may be rejected has no name.
    """
    full = min(computed_tokens, known_tokens) // block_tokens
    return range(state.stored, max(state.stored, full))
