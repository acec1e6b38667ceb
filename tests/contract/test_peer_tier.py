"""The tier contract over a neighbour's blocks, and what neighbours can do wrong."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import Outcome
from kvstore.observe.metrics import TierMetrics
from kvstore.rpc.v1 import cache_pb2
from kvstore.testing.contracts import ROOT, TierContract, block, wanted
from kvstore.tiers.base import ReadItem, Tier, WriteItem
from kvstore.tiers.peer import Neighbour, PeerTier, RootFacts
from tests.patience import PATIENCE_MS
from tests.scripted_holder import ScriptedHolder

HIT, MISS, LATE, CORRUPT = Outcome.HIT, Outcome.MISS, Outcome.LATE, Outcome.CORRUPT
FACTS = RootFacts(payload_bytes=len(block(0).source) - 512, shares=2, group="full", share_domain="")


class Rumours:
    """Who is said to hold what: `holders` of a real node answers from its view."""

    def __init__(self, *holders: ScriptedHolder) -> None:
        self.listed = list(holders)
        self.everything = False
        """Whether everyone is said to hold everything."""

    def holders(self, root: Root, name: BlockName) -> Sequence[Neighbour]:
        return [
            one.neighbour for one in self.listed if self.everything or (root, name) in one.blocks
        ]


class Shelf(PeerTier):
    """A peer tier whose writes appear at the neighbour, as if its own workers had made them."""

    def __init__(self, holder: ScriptedHolder) -> None:
        self.holder = holder
        super().__init__(Rumours(holder), lambda root: FACTS, TierMetrics(CollectorRegistry()))

    async def write(self, batch: Sequence[WriteItem], *, deadline_ms: int) -> list[Outcome]:
        if self._closed:
            return await super().write(batch, deadline_ms=deadline_ms)
        for item in batch:
            self.holder.blocks[item.header.root, item.header.name] = (
                item.header,
                bytes(item.source),
            )
            item.drained.set()
        return [HIT] * len(batch)

    async def remove(self, blocks: Sequence[tuple[Root, BlockName]]) -> None:
        for one in blocks:
            self.holder.blocks.pop(one, None)

    async def close(self) -> None:
        await super().close()
        await self.holder.stop()


class TestPeersKeepTheContract(TierContract):
    async def open(self) -> Tier:
        return Shelf(await ScriptedHolder("there").start())


@pytest.fixture
async def two() -> AsyncIterator[tuple[ScriptedHolder, ScriptedHolder]]:
    """Return two holders of the same four blocks; `a` is asked first."""
    holders = await ScriptedHolder("a").start(), await ScriptedHolder("b").start()
    for holder in holders:
        for item in map(block, range(4)):
            holder.blocks[ROOT, item.header.name] = (item.header, bytes(item.source))
    yield holders
    for holder in holders:
        await holder.stop()


@pytest.fixture
async def tier(two: tuple[ScriptedHolder, ScriptedHolder]) -> AsyncIterator[PeerTier]:
    made = PeerTier(Rumours(*two), lambda root: FACTS, TierMetrics(CollectorRegistry()))
    yield made
    await made.close()


async def read(tier: PeerTier, count: int = 4, deadline_ms: int = PATIENCE_MS) -> list[Outcome]:
    items = wanted([block(number) for number in range(count)])
    outcomes = await tier.read(items, deadline_ms=deadline_ms)
    for number, (item, outcome) in enumerate(zip(items, outcomes, strict=True)):
        assert item.drained.is_set()
        if outcome is HIT:
            assert item.into[: FACTS.payload_bytes] == block(number).source[: FACTS.payload_bytes]
            assert item.sum == block(number).header.sum
        else:
            assert not item.sum
    return outcomes


def _other_sums(reply: cache_pb2.LendReply) -> None:
    reply.sums = bytes(len(reply.sums))


def _no_sums(reply: cache_pb2.LendReply) -> None:
    reply.sums = b""


def _no_ticket(reply: cache_pb2.LendReply) -> None:
    reply.ticket = b""


def _forged_ticket(reply: cache_pb2.LendReply) -> None:
    reply.ticket = bytes(32)


def _no_address(reply: cache_pb2.LendReply) -> None:
    reply.bulk_address = "nowhere"


def _dead_port(reply: cache_pb2.LendReply) -> None:
    reply.bulk_address = "127.0.0.1:1"


def _too_few(reply: cache_pb2.LendReply) -> None:
    del reply.outcomes[1:]


def _nonsense(reply: cache_pb2.LendReply) -> None:
    reply.outcomes[0] = 77  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("spoil", "outcome"),
    [
        (_other_sums, CORRUPT),
        (_no_sums, LATE),
        (_no_ticket, LATE),
        (_forged_ticket, Outcome.REFUSED),
        (_no_address, Outcome.REFUSED),
        (_dead_port, LATE),
        (_too_few, LATE),
        (_nonsense, LATE),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
async def test_a_neighbour_that_lies_is_an_outcome_and_the_next_is_asked(
    two: tuple[ScriptedHolder, ScriptedHolder],
    tier: PeerTier,
    spoil: Callable[[cache_pb2.LendReply], None],
    outcome: Outcome,
) -> None:
    first, second = two
    first.spoil = spoil
    assert await read(tier) == [HIT] * 4
    assert (len(first.asked), len(second.asked)) == (1, 1)
    second.blocks.clear()
    first.spoil = lambda reply: None
    alone = PeerTier(Rumours(first), lambda root: FACTS, TierMetrics(CollectorRegistry()))
    first.spoil = spoil
    assert set(await read(alone)) == {outcome}
    await alone.close()


async def test_a_hung_neighbour_costs_one_deadline_and_is_left_alone(
    two: tuple[ScriptedHolder, ScriptedHolder], tier: PeerTier
) -> None:
    first, second = two
    first.hang = True
    assert await read(tier, deadline_ms=200) == [HIT] * 4
    assert (len(first.asked), len(second.asked)) == (1, 1)
    for _ in range(3):
        assert await read(tier) == [HIT] * 4
    assert len(first.asked) == 1, "its breaker is open"
    second.blocks.clear()
    assert not tier.holds(ROOT, block(0).header.name), "nothing is claimed of it meanwhile"


async def test_a_dead_neighbour_is_passed_over(
    two: tuple[ScriptedHolder, ScriptedHolder], tier: PeerTier
) -> None:
    await two[0].stop()
    assert await read(tier) == [HIT] * 4
    assert len(two[1].asked) == 1


async def test_a_neighbour_that_dropped_a_block_is_no_failure(
    two: tuple[ScriptedHolder, ScriptedHolder], tier: PeerTier
) -> None:
    first, second = two
    tier._neighbours.everything = True  # type: ignore[attr-defined]
    del first.blocks[ROOT, block(1).header.name]
    assert await read(tier) == [HIT] * 4
    assert [len(names) for names in second.asked] == [1], "only what the first did not have"
    del second.blocks[ROOT, block(1).header.name]
    assert await read(tier) == [HIT, MISS, HIT, HIT]
    assert tier.holds(ROOT, block(0).header.name), "no breaker has opened"


async def test_a_line_that_nobody_uses_is_closed_and_made_anew(
    two: tuple[ScriptedHolder, ScriptedHolder], tier: PeerTier
) -> None:
    assert await read(tier) == [HIT] * 4
    tier.measure()
    assert tier._lines, "they were used just now"
    for line in tier._lines.values():
        line.used_ms -= 1e6
    tier.measure()
    assert not tier._lines
    assert await read(tier) == [HIT] * 4


async def test_load_is_spread_over_neighbours(
    two: tuple[ScriptedHolder, ScriptedHolder], tier: PeerTier
) -> None:
    await asyncio.gather(*(read(tier) for _ in range(8)))
    assert all(holder.asked for holder in two)


async def test_an_unknown_root_misses() -> None:
    holder = await ScriptedHolder("a").start()
    tier = PeerTier(Rumours(holder), lambda root: None, TierMetrics(CollectorRegistry()))
    assert await read(tier, 1) == [MISS]
    await tier.close()
    await holder.stop()


async def test_a_cancelled_read_lets_the_buffers_go(
    two: tuple[ScriptedHolder, ScriptedHolder], tier: PeerTier
) -> None:
    two[0].hang = two[1].hang = True
    items: list[ReadItem] = wanted([block(0)])
    reading = asyncio.create_task(tier.read(items, deadline_ms=60_000))
    while not two[0].asked:  # noqa: ASYNC110 - the holder has no event
        await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert items[0].drained.is_set()
    two[0].hang = two[1].hang = False
    assert await read(tier, 1) == [HIT], "an abandoned read says nothing about its neighbour"
