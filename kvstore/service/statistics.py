"""The answer to Stats: what a node holds, by tier and by state. Pure."""

from kvstore.core.slots import SlotState
from kvstore.rpc.v1 import cache_pb2, types_pb2
from kvstore.service.store import ArenaStore
from kvstore.tiers.nvme import NvmeTier


def stats_reply(
    node: str, store: ArenaStore, nvme: NvmeTier | None, *, corrupt: int, uptime_s: float
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
    if nvme is not None:
        reply.tiers.add(
            tier=types_pb2.TIER_NVME,
            capacity_bytes=nvme.capacity_bytes,
            used_bytes=nvme.used_bytes,
            blocks=len(nvme),
            hits=nvme.hits,
            misses=nvme.misses,
            evictions=nvme.evictions,
            corrupt=nvme.corrupt,
        )
    for state in SlotState:
        if state is not SlotState.FREE:
            reply.slots[state.name.lower()] = table.counts[state]
    return reply
