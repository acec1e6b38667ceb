"""What the calls of a client return, and how it is read from the wire."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Final, NamedTuple, cast

from kvstore.core.errors import BadInput, Unreachable
from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.names import BlockName, join_names
from kvstore.core.outcomes import MissReason, Outcome, SettleOutcome
from kvstore.directory.events import TierKind
from kvstore.rpc.convert import tier_from_wire
from kvstore.rpc.v1 import cache_pb2

Names = Sequence[BlockName] | bytes
"""Block names in prefix order, or the same already packed (32 bytes each), which saves a join."""

_TIER_SETS: Final = [
    frozenset(kind for kind in TierKind if mask >> kind & 1) for mask in range(256)
]


class SlotRef(NamedTuple):
    """One slot at one generation: where a block's bytes are, or are to be put."""

    slot: int
    generation: int
    offset: int
    """Bytes from the start of the arena's data."""
    tier: TierKind
    """Where the block came from; DRAM when it was resident or when the slot is a reserved one."""
    arena: int
    """Which of the arenas that this client has mapped; a restarted keeper brings another."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """A slot to be written with the block of `names[index]`, and then committed or aborted."""

    index: int
    slot: SlotRef


@dataclass(frozen=True, slots=True)
class Acquired:
    """The answer to `acquire`: `names[i]` is in `(ready + pending)[i]`."""

    lease: int
    """To be released by `settle`; 0 when nothing was leased."""
    lease_ms: int
    ready: list[SlotRef]
    """Readable now."""
    pending: list[SlotRef]
    """On their way; see `wait_ready`."""
    reserved: list[Reserved]
    reason: MissReason
    """Why the prefix ends after `ready + pending`."""
    reserve_reason: MissReason
    """Why fewer slots were reserved than asked for; NONE when all were or the rest is held."""
    incarnation: int


@dataclass(frozen=True, slots=True)
class Settled:
    """One outcome per item, in the order of the call."""

    commit: list[SettleOutcome]
    abort: list[SettleOutcome]
    release: list[SettleOutcome]


@dataclass(frozen=True, slots=True)
class Lookup:
    """What is here at this moment, without a lease: a hint."""

    prefix: int
    """Blocks found from the start without a hole."""
    tiers: list[frozenset[TierKind]]
    """Per name, where it is held."""


@dataclass(frozen=True, slots=True)
class TierUse:
    """Size and luck of one tier."""

    capacity_bytes: int
    used_bytes: int
    blocks: int
    hits: int
    misses: int
    evictions: int
    corrupt: int


@dataclass(frozen=True, slots=True)
class NodeStats:
    """A cache node as it sees itself."""

    node: str
    incarnation: int
    uptime_ms: int
    tiers: dict[TierKind, TierUse]
    slots: dict[str, int]
    """Slots by state."""
    sessions: int
    leases: int
    reserved_bytes: int


def packed_names(names: Names) -> bytes:
    """Return names as the wire has them; raises `BadInput` for what is no sequence of bytes."""
    if isinstance(names, bytes):
        return names
    try:
        return join_names(names)
    except TypeError as error:
        raise BadInput(f"names are not bytes: {error}") from error


def slot_refs(slots: Iterable[SlotRef]) -> cache_pb2.SlotRefs:
    """Return the wire form of slots."""
    listed = list(slots)
    try:
        return cache_pb2.SlotRefs(
            slots=[ref.slot for ref in listed], generations=[ref.generation for ref in listed]
        )
    except ValueError as error:
        raise BadInput(f"a slot or generation is out of range: {error}") from error


_SETTLED: Final = {int(outcome): outcome for outcome in SettleOutcome}
_TIERS: Final = {int(kind): kind for kind in TierKind}
# An answer has thousands of slots: no Python frame for each (an enum's call costs 0.6 us).
_new_tuple = cast("Callable[[type[SlotRef], tuple[object, ...]], SlotRef]", tuple.__new__)


def acquired_from(reply: cache_pb2.AcquireReply, arena: int) -> Acquired:
    """Read the answer to Acquire; `arena` is the number of the arena its slots are in."""
    tiers = chain(repeat(TierKind.DRAM, reply.ready), map(_TIERS.__getitem__, reply.tiers))
    # Slices: iterating over a message's list costs twice as much.
    offsets = [granules * GRANULE_BYTES for granules in reply.offsets[:]]
    held = _refs(reply.slots[:], reply.generations[:], offsets, tiers, arena)
    offsets = [granules * GRANULE_BYTES for granules in reply.reserved_offsets[:]]
    slots = reply.reserved_slots[:]
    own = repeat(TierKind.DRAM, len(slots))
    writable = _refs(slots, reply.reserved_generations[:], offsets, own, arena)
    if len(held) != reply.ready + reply.pending or len(writable) != len(reply.reserved_names):
        raise Unreachable("the cache node's answer is malformed: its lists differ in length")
    return Acquired(
        lease=reply.lease,
        lease_ms=reply.lease_ms,
        ready=held[: reply.ready],
        pending=held[reply.ready :],
        reserved=list(map(Reserved, reply.reserved_names, writable)),
        reason=MissReason(reply.reason),
        reserve_reason=MissReason(reply.reserve_reason),
        incarnation=reply.incarnation,
    )


def private_from(reply: cache_pb2.ReservePrivateReply, arena: int) -> list[SlotRef]:
    """Read the slots of the answer to ReservePrivate."""
    offsets = [granules * GRANULE_BYTES for granules in reply.offsets[:]]
    slots = reply.slots[:]
    own = repeat(TierKind.DRAM, len(slots))
    return _refs(slots, reply.generations[:], offsets, own, arena)


def _refs(
    slots: Sequence[int],
    generations: Sequence[int],
    offsets: Iterable[int],
    tiers: Iterable[TierKind],
    arena: int,
) -> list[SlotRef]:
    arenas = repeat(arena, len(slots))
    try:
        # strict: a short list would otherwise pair a slot with nothing and drop it silently.
        rows = zip(slots, generations, offsets, tiers, arenas, strict=True)
        return list(map(_new_tuple, repeat(SlotRef), rows))
    except (KeyError, ValueError) as error:
        raise Unreachable(f"the cache node's answer is malformed: {error!r}") from error


def settled_from(reply: cache_pb2.SettleReply) -> Settled:
    """Read the answer to Settle."""
    try:
        return Settled(
            commit=_outcomes(reply.commit[:]),
            abort=_outcomes(reply.abort[:]),
            release=_outcomes(reply.release[:]),
        )
    except KeyError as error:
        raise Unreachable(f"the cache node's answer is malformed: outcome {error}") from error


def _outcomes(numbers: Sequence[int]) -> list[SettleOutcome]:
    """Return what numbers stand for; many are mostly all alike."""
    if numbers and numbers.count(numbers[0]) == len(numbers):
        return [_SETTLED[numbers[0]]] * len(numbers)
    return [_SETTLED[number] for number in numbers]


def outcomes_from(reply: cache_pb2.WaitReply) -> list[Outcome]:
    """Read the answer to Wait."""
    return list(map(Outcome, reply.outcomes))


def lookup_from(reply: cache_pb2.LookupReply) -> Lookup:
    """Read the answer to Lookup."""
    return Lookup(reply.prefix, list(map(_TIER_SETS.__getitem__, reply.tiers)))


def stats_from(reply: cache_pb2.StatsReply) -> NodeStats:
    """Read the answer to Stats."""
    return NodeStats(
        node=reply.node,
        incarnation=reply.incarnation,
        uptime_ms=reply.uptime_ms,
        tiers={
            tier_from_wire(tier.tier): TierUse(
                capacity_bytes=tier.capacity_bytes,
                used_bytes=tier.used_bytes,
                blocks=tier.blocks,
                hits=tier.hits,
                misses=tier.misses,
                evictions=tier.evictions,
                corrupt=tier.corrupt,
            )
            for tier in reply.tiers
        },
        slots=dict(reply.slots),
        sessions=reply.sessions,
        leases=reply.leases,
        reserved_bytes=reply.reserved_bytes,
    )
