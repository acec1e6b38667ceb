"""Tiers below DRAM wired to a store: configuration, promotion's decisions, listings, counts."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput
from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import MissReason
from kvstore.directory.events import Changed, TierKind
from kvstore.directory.lru import Lru
from kvstore.directory.policy import BlockKey
from kvstore.observe.metrics import NodeMetrics, PeerMetrics, TierMetrics
from kvstore.rpc.v1 import types_pb2
from kvstore.service.below import BelowConfig, BelowDram, NodeParts
from kvstore.service.hashing import Hasher
from kvstore.service.holdings import NodeHoldings
from kvstore.service.promotion import LOADER_SESSION, Promoter
from kvstore.service.reserver import Wanted
from kvstore.service.roots import keys_of
from kvstore.service.statistics import stats_reply
from kvstore.tiers.nvme import NvmeTier
from tests.arena_fixture import SmallStore, names, small_store
from tests.patience import until

NVME = TierKind.NVME


@pytest.mark.parametrize(
    ("nvme", "nvme_bytes", "says"),
    [
        (None, 1 << 20, "belong together"),
        (Path("d"), 0, "belong together"),
        (Path("d"), 4_096, "holds nothing"),
    ],
)
def test_half_a_tier_is_an_error(nvme: Path | None, nvme_bytes: int, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        BelowConfig(nvme=nvme, nvme_bytes=nvme_bytes, policy="lru")


def test_a_node_publishes_the_tiers_that_it_has() -> None:
    assert BelowConfig(policy="lru").kinds == (TierKind.DRAM,)
    config = BelowConfig(nvme=Path("d"), nvme_bytes=1 << 20, policy="lru")
    assert config.kinds == (TierKind.DRAM, NVME)


class Everything:
    """A tier below that holds what it is told to, `room` bytes a call."""

    def __init__(self, *held: bytes, room: int = 1 << 20) -> None:
        self.held = set(held)
        self.room = room

    def holder(self, root: Root, name: BlockName, *, own: bool = False) -> TierKind | None:
        return NVME if name in self.held else None

    def loadable_bytes(self, tier: TierKind, within_ms: float) -> int:
        return self.room


class TestPromotion:
    def wanted(self, small: SmallStore, prompt: list[bytes]) -> Wanted:
        _, info = small.session(1)
        packed = b"".join(prompt)
        return Wanted(info, packed, keys_of(info, packed), 5, 1.0)

    def test_the_loader_reserves_in_prefix_order_and_stops_at_a_hole(self) -> None:
        prompt = names(6)
        with small_store() as small:
            promoter = Promoter(small.store.reserver, Everything(*prompt[:3], *prompt[4:]))
            found = promoter.pending(self.wanted(small, prompt), 0, 10)
            assert (len(found.slots), found.tiers, found.reason) == (3, [NVME] * 3, MissReason.NONE)
            assert [load.slot for load in found.loads] == found.slots
            records = [small.arena.record(slot) for slot in found.slots]
            assert [record.name for record in records] == prompt[:3]
            assert [record.position for record in records] == [5, 6, 7]
            assert [small.table.pins[slot] for slot in found.slots] == [1, 1, 1]
            assert small.table.writer[found.slots[0]] == LOADER_SESSION

    def test_no_more_than_arrives_in_time(self) -> None:
        prompt = names(6)
        with small_store() as small:
            promoter = Promoter(small.store.reserver, Everything(*prompt, room=2 * 4096 + 5))
            found = promoter.pending(self.wanted(small, prompt), 0, 10)
            assert (len(found.slots), found.reason) == (2, MissReason.LATE)

    def test_no_more_than_the_quota_and_the_arena_hold(self) -> None:
        prompt = names(12)
        with small_store(8, quota_blocks=4) as small:
            promoter = Promoter(small.store.reserver, Everything(*prompt))
            found = promoter.pending(self.wanted(small, prompt), 0, 10)
            assert (len(found.slots), found.reason) == (4, MissReason.LATE)
        with small_store(8, quota_blocks=16) as small:
            promoter = Promoter(small.store.reserver, Everything(*prompt))
            found = promoter.pending(self.wanted(small, prompt), 0, 10)
            assert (len(found.slots), found.reason) == (8, MissReason.REFUSED)

    def test_a_settled_slot_is_off_the_loaders_account(self) -> None:
        prompt = names(2)
        with small_store() as small:
            promoter = Promoter(small.store.reserver, Everything(*prompt))
            found = promoter.pending(self.wanted(small, prompt), 0, 10)
            assert promoter.loader.reserved_bytes == 2 * 4096
            for slot in found.slots:
                promoter.settled(slot)
                small.table.give_up(slot)
            assert promoter.loader.reserved_bytes == 0
            small.table.unpin(found.slots)
            assert not any(small.table.state)

    def test_prefetch_skips_what_is_here(self) -> None:
        prompt = names(4)
        with small_store() as small:
            session, info = small.session(2)
            small.put(session, info, prompt[1:2], 0.0)
            promoter = Promoter(small.store.reserver, Everything(*prompt))
            loads = promoter.prefetch(self.wanted(small, prompt), 10)
            got = [small.arena.name(load.slot) for load in loads]
            assert got == [prompt[0], prompt[2], prompt[3]]


async def begin(
    small: SmallStore, config: BelowConfig
) -> tuple[BelowDram, Hasher, CollectorRegistry]:
    """Start what lies below a small store."""
    metrics = NodeMetrics(registry := CollectorRegistry())
    hasher = Hasher(small.store, metrics)
    parts = NodeParts(
        node="here",
        store=small.store,
        hasher=hasher,
        metrics=metrics,
        tier_metrics=TierMetrics(registry),
        peer_metrics=PeerMetrics(registry),
    )
    below = await BelowDram.start(config, parts)
    return below, hasher, registry


async def test_everything_a_node_holds_is_listed_and_counted(tmp_path: Path) -> None:
    with small_store() as small:
        small.table.publisher.tiers = (TierKind.DRAM, NVME)
        small.table.publisher._count[NVME] = small.table.publisher._xor[NVME] = 0
        config = BelowConfig(nvme=tmp_path, nvme_bytes=4 << 20, policy="lru")
        below, hasher, registry = await begin(small, config)
        hashing = asyncio.create_task(hasher.run())
        nvme = below.stored[NVME]
        assert isinstance(nvme, NvmeTier)
        assert not small.table.bypass, "the arena is the only way to the disk"
        await nvme.loaded()
        session, info = small.session(1)
        prompt = names(5)
        small.put(session, info, prompt, 0.0)
        hasher.wake()
        await until(lambda: len(nvme) == 5)
        assert below.bits(info.root, BlockName(prompt[0])) == 1 << int(NVME)
        assert below.bits(info.root, BlockName(names(1, 9)[0])) == 0

        changes: list[Changed] = []
        holdings = small.table.publisher.holdings
        assert isinstance(holdings, NodeHoldings)
        cursor: int | None = 0
        while cursor is not None:
            found, cursor = holdings.scan(cursor, 16)
            changes += found
        for tier in (TierKind.DRAM, NVME):
            listed = {name for c in changes if c.tier is tier for name in c.names}
            assert listed == set(prompt)
        assert {c.block_bytes for c in changes} == {4096}
        assert [digest.count for digest in small.table.publisher.digests()] == [5, 5]

        below.measure()
        labels = {"tier": "nvme"}
        used = registry.get_sample_value("kvstore_tier_used_bytes", labels)
        assert used == nvme.used_bytes == 5 * 8192
        disk, free = (
            registry.get_sample_value(f"kvstore_tier_disk_{what}", labels)
            for what in ("bytes", "free_bytes")
        )
        assert disk is not None and free is not None and 0 < free <= disk
        reply = stats_reply("n", small.store, below.stored, corrupt=0, uptime_s=1.0)
        assert [(t.tier, t.blocks) for t in reply.tiers] == [
            (types_pb2.TIER_DRAM, 5), (types_pb2.TIER_NVME, 5)
        ]  # fmt: skip
        await below.close()
        hashing.cancel()
        await asyncio.gather(hashing, return_exceptions=True)


async def test_without_a_disk_nothing_is_below() -> None:
    with small_store() as small:
        below, _, _ = await begin(small, BelowConfig(policy="lru"))
        assert (below.stored, small.store.promoter) == ({}, None)
        assert below.bits(Root(bytes(32)), BlockName(bytes(32))) == 0
        below.measure()
        await below.close()


class Refusing(Lru):
    """Thinks every newcomer worth less than what is held."""

    def victims(self, count: int, **options: Any) -> list[BlockKey]:
        return [] if options.get("newcomers") else super().victims(count, **options)


@pytest.mark.parametrize(("bypass", "reserved"), [(True, 0), (False, 4)])
def test_the_arena_keeps_nothing_out_where_a_tier_lies_below(bypass: bool, reserved: int) -> None:
    with small_store(8) as small:
        small.table.policy = Refusing()
        small.table.bypass = bypass
        session, info = small.session(1)
        old = names(8)
        small.put(session, info, old, 0.0)
        slots = list(small.table.index.values())
        small.table.seal(slots, [bytes(16)] * len(slots))
        answer = small.store.acquire(
            session, info, b"".join(names(4, 9)), reserve=4, first_block=0, now_ms=1.0
        )
        assert len(answer.reserved_slots) == reserved
