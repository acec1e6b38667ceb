"""What publishers say about the blocks they hold, independent of how it travelled.

Events are absolute (this name is / is not in this tier), hence idempotent: applying one twice or
late can only make the view over-promise until the next event, mark or snapshot.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import NamedTuple

from kvstore.core.names import BlockName, Root


class TierKind(IntEnum):
    """A place where blocks live, fastest first. Numbers equal the wire's `Tier`."""

    HBM = 1
    DRAM = 2
    NVME = 3
    PEER = 4
    FILES = 5


class WorkerRole(StrEnum):
    """What a worker is there for, as its operator says."""

    BOTH = "both"
    PREFILL = "prefill"
    """Computes prompts and gives their first tokens; another worker goes on."""
    DECODE = "decode"
    """Is kept free for answers: computes a prompt where that is cheaper all the same."""


@dataclass(frozen=True, slots=True)
class Began:
    """A snapshot starts: what was known of these tiers of this publisher is void at `Ended`."""

    publisher: str
    incarnation: int
    sequence: int
    tiers: tuple[TierKind, ...]
    host: str = ""


@dataclass(frozen=True, slots=True)
class Changed:
    """Blocks are in a tier (`deleted` false) or are not. `first_sequence` 0: part of a snapshot."""

    root: Root
    tier: TierKind
    names: Sequence[BlockName]
    deleted: bool = False
    first_sequence: int = 0
    block_bytes: int = 0
    group: str = "full"


def pieces(change: Changed, names: int) -> Iterator[Changed]:
    """Cut a change into ones of so many names, numbered as it is."""
    assert names > 0
    for start in range(0, len(change.names), names):
        first = change.first_sequence + start if change.first_sequence else 0
        part = change.names[start : start + names]
        yield replace(change, names=part, first_sequence=first)


@dataclass(frozen=True, slots=True)
class Ended:
    """The snapshot is complete as of `sequence`."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Digest:
    """Count and xor of key prefixes of what a publisher holds in one tier."""

    tier: TierKind
    count: int
    xor_prefixes: int


@dataclass(frozen=True, slots=True)
class Marked:
    """Heartbeat with digests; at an equal sequence a different digest means a hole in the view."""

    sequence: int
    digests: tuple[Digest, ...] = ()


class LoadRate(NamedTuple):
    """What loading a token from one tier took a worker."""

    tier: TierKind
    s_per_token: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker's load and measured rates."""

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    kv_used_bytes: int = 0
    kv_capacity_bytes: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    prefill_linear_s: float = 0.0
    prefill_quadratic_s: float = 0.0
    draining: bool = False
    queued_token_depths: float = 0.0
    """Sum over the queued tokens of how many tokens of their prompts come before each; 0: not told.
    A token deep in a prompt takes longer than one at its beginning."""
    load_rates: tuple[LoadRate, ...] = ()
    """Of the tiers that it has loaded from."""
    role: WorkerRole = WorkerRole.BOTH


@dataclass(frozen=True, slots=True)
class Lost:
    """The publisher is gone or unreachable: nothing may be routed to it."""

    reason: str


Event = Began | Changed | Ended | Marked | Loaded | Lost
