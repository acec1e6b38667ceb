"""The answer to Stats: what a node holds, by tier and by state. Pure."""

from kvstore.core.slots import SlotState
from kvstore.rpc.v1 import cache_pb2, types_pb2
from kvstore.service.holdings import Stored
from kvstore.service.store import ArenaStore


def stats_reply(
    node: str, store: ArenaStore, below: Stored, *, corrupt: int, uptime_s: float
) -> cache_pb2.StatsReply:
    """Count what is held; `corrupt` blocks of the arena failed their sums so far."""
    table = store.table
    reply = cache_pb2.StatsReply(
        node=node,
        incarnation=table.publisher.incarnation,
        uptime_ms=int(uptime_s * 1_000),
        sessions=len(store.sessions),
        leases=len(store.leases),
        reserved_bytes=table.reserved_bytes,
    )
    reply.tiers.add(
        tier=types_pb2.TIER_DRAM,
        capacity_bytes=table.space.data_bytes,
        used_bytes=table.used_bytes,
        blocks=len(table.policy),
        hits=store.hit_blocks,
        misses=store.misses,
        evictions=table.evicted_blocks,
        corrupt=corrupt,
    )
    for kind, tier in below.items():
        reply.tiers.add(
            tier=types_pb2.Tier.Name(int(kind)),
            capacity_bytes=tier.capacity_bytes,
            used_bytes=tier.used_bytes,
            blocks=len(tier),
            hits=tier.hits,
            misses=tier.misses,
            evictions=tier.evictions,
            corrupt=tier.corrupt,
        )
    for state in SlotState:
        if state is not SlotState.FREE:
            reply.slots[state.name.lower()] = table.counts[state]
    return reply
