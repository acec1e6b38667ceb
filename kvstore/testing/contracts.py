"""Contract suites: what every `Tier`, `Policy` and `Transport` has to keep, ours or yours.

Subclass a suite in a test module, say how to make the thing, and pytest runs the suite over it:

    class TestMyTier(TierContract):
        async def open(self) -> Tier:
            return MyTier(...)

Suites use plain asserts; coroutine tests need pytest-asyncio in auto mode (or a mark on the
subclass). Each statement of an interface's docstring has a test here, and each test has been
seen to fail over an implementation that breaks the statement (tests/contract).
"""

import asyncio
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import Outcome
from kvstore.tiers.base import BlockHeader, ReadItem, Tier, WriteItem
from kvstore.tiers.sums import block_sum
from kvstore.transport.base import Ticket, Transport

ROOT: Final = Root(hashlib.sha256(b"root").digest())
OTHER_ROOT: Final = Root(hashlib.sha256(b"other root").digest())
DEADLINE_MS: Final = 60_000
"""Generous: a suite measures promises, not speed."""


def block(number: int, *, root: Root = ROOT, block_bytes: int = 2 * GRANULE_BYTES) -> WriteItem:
    """Return a block with content that tells blocks and roots apart, padding included."""
    name = BlockName(hashlib.sha256(b"block %d" % number).digest())
    payload_bytes = block_bytes - 512
    content = hashlib.shake_128(root + name).digest(payload_bytes)
    return WriteItem(
        header=BlockHeader(
            root=root,
            name=name,
            payload_bytes=payload_bytes,
            shares=2,
            sum=block_sum(memoryview(content), 2),
            position=number,
        ),
        source=memoryview(content + bytes(block_bytes - payload_bytes)),
    )


def wanted(items: Sequence[WriteItem]) -> list[ReadItem]:
    """Return reads of `items` into buffers that hold something else."""
    return [
        ReadItem(i.header.root, i.header.name, memoryview(bytearray(b"\xa5" * len(i.source))))
        for i in items
    ]


class TierContract:
    """What every tier keeps. Needs room for 16 blocks of 8 KiB."""

    reliable: bool = True
    """False: any operation may fail, as over a faulty device. It still must not lie."""

    async def open(self) -> Tier:
        """Return an empty tier."""
        raise NotImplementedError

    async def _read(self, tier: Tier, items: Sequence[WriteItem]) -> list[Outcome]:
        """Read `items`; whatever is called a hit must be the block's very bytes."""
        reads = wanted(items)
        outcomes = await tier.read(reads, deadline_ms=DEADLINE_MS)
        assert len(outcomes) == len(items), "one outcome per item"
        for item, read, outcome in zip(items, reads, outcomes, strict=True):
            async with asyncio.timeout(DEADLINE_MS / 1000):
                await read.drained.wait()
            size = item.header.payload_bytes
            if outcome is Outcome.HIT:
                assert read.into[:size] == item.source[:size], "a hit with other bytes"
        return outcomes

    async def _write(self, tier: Tier, items: Sequence[WriteItem]) -> list[Outcome]:
        outcomes = await tier.write(items, deadline_ms=DEADLINE_MS)
        assert len(outcomes) == len(items), "one outcome per item"
        for item in items:
            async with asyncio.timeout(DEADLINE_MS / 1000):
                await item.drained.wait()
        return outcomes

    async def test_what_was_never_written_misses(self) -> None:
        tier = await self.open()
        outcomes = await self._read(tier, [block(1), block(2)])
        assert Outcome.HIT not in outcomes
        assert not self.reliable or outcomes == [Outcome.MISS, Outcome.MISS]
        assert not tier.holds(ROOT, block(1).header.name)
        await tier.close()

    async def test_what_was_written_is_read_back(self) -> None:
        tier = await self.open()
        items = [block(n) for n in range(8)]
        written = await self._write(tier, items)
        read = await self._read(tier, items)
        if self.reliable:
            assert written == read == [Outcome.HIT] * 8
            assert all(tier.holds(i.header.root, i.header.name) for i in items)
        await tier.close()

    async def test_outcomes_stand_in_the_order_of_the_batch(self) -> None:
        tier = await self.open()
        written = await self._write(tier, [block(1), block(3)])
        outcomes = await self._read(tier, [block(n) for n in (0, 1, 2, 3)])
        assert outcomes[0] is not Outcome.HIT
        assert outcomes[2] is not Outcome.HIT
        if self.reliable:
            assert written == [outcomes[1], outcomes[3]] == [Outcome.HIT] * 2
        await tier.close()

    async def test_empty_batches_are_nothing(self) -> None:
        tier = await self.open()
        assert await tier.read([], deadline_ms=DEADLINE_MS) == []
        assert await tier.write([], deadline_ms=DEADLINE_MS) == []
        await tier.remove([])
        await tier.close()

    async def test_the_same_name_under_another_root_is_another_block(self) -> None:
        tier = await self.open()
        await self._write(tier, [block(5)])
        outcomes = await self._read(tier, [block(5, root=OTHER_ROOT)])
        assert outcomes[0] is not Outcome.HIT
        await self._write(tier, [block(5, root=OTHER_ROOT)])
        await self._read(tier, [block(5), block(5, root=OTHER_ROOT)])
        await tier.close()

    async def test_writing_twice_is_harmless(self) -> None:
        tier = await self.open()
        await self._write(tier, [block(1)])
        again = await self._write(tier, [block(1)])
        read = await self._read(tier, [block(1)])
        assert not self.reliable or again == read == [Outcome.HIT]
        await tier.close()

    async def test_what_was_removed_misses(self) -> None:
        tier = await self.open()
        items = [block(1), block(2)]
        await self._write(tier, items)
        await tier.remove([(ROOT, items[0].header.name), (ROOT, block(77).header.name)])
        outcomes = await self._read(tier, items)
        assert outcomes[0] is not Outcome.HIT
        assert not self.reliable or outcomes == [Outcome.MISS, Outcome.HIT]
        assert not tier.holds(ROOT, items[0].header.name)
        await tier.close()

    async def test_bytes_that_fail_their_sum_are_never_a_hit(self) -> None:
        tier = await self.open()
        good = block(4)
        spoilt = bytearray(good.source)
        spoilt[100] ^= 1
        await self._write(tier, [WriteItem(good.header, memoryview(spoilt))])
        read = wanted([good])
        outcomes = await tier.read(read, deadline_ms=DEADLINE_MS)
        assert outcomes[0] is not Outcome.HIT, "a hit whose bytes were not verified"
        await tier.close()

    async def test_a_cancelled_write_is_whole_or_absent(self) -> None:
        for awaits in range(4):
            tier = await self.open()
            item = block(awaits)
            writing = asyncio.ensure_future(tier.write([item], deadline_ms=DEADLINE_MS))
            for _ in range(awaits):
                await asyncio.sleep(0)
            writing.cancel()
            with suppress(asyncio.CancelledError):
                await writing
            await self._read(tier, [item])  # asserts the bytes of a hit
            await tier.close()

    async def test_a_closed_tier_answers_without_raising(self) -> None:
        tier = await self.open()
        await self._write(tier, [block(1)])
        await tier.close()
        ended = {Outcome.LATE, Outcome.REFUSED, Outcome.MISS}
        assert set(await tier.read(wanted([block(1)]), deadline_ms=DEADLINE_MS)) <= ended
        assert set(await tier.write([block(2)], deadline_ms=DEADLINE_MS)) <= ended
        await tier.close()


class TransportContract:
    """What every transport keeps. `offer` and `want` play the side that hands tickets out."""

    async def open(self) -> Transport:
        """Return a transport that can reach the holder."""
        raise NotImplementedError

    async def offer(self, blocks: Sequence[bytes], *, expired: bool = False) -> Ticket:
        """Return a ticket to fetch `blocks`; already past its time when `expired`."""
        raise NotImplementedError

    async def want(self, sizes: Sequence[int]) -> tuple[Ticket, Sequence[memoryview]]:
        """Return a ticket to send blocks of `sizes`, and where they will arrive."""
        raise NotImplementedError

    async def _fetch(
        self, transport: Transport, ticket: Ticket, into: Sequence[memoryview]
    ) -> set[Outcome]:
        outcomes = await transport.fetch(ticket, into, stall_deadline_ms=DEADLINE_MS)
        assert len(outcomes) == len(into), "one outcome per block"
        return set(outcomes)

    async def test_fetched_bytes_are_the_offered_ones_in_order(self) -> None:
        transport = await self.open()
        blocks = [bytes([n]) * (GRANULE_BYTES * (n + 1)) for n in range(5)]
        into = [memoryview(bytearray(len(b))) for b in blocks]
        ticket = await self.offer(blocks)
        assert await self._fetch(transport, ticket, into) == {Outcome.HIT}
        assert [bytes(view) for view in into] == blocks
        await transport.close()

    async def test_sent_bytes_arrive_in_order(self) -> None:
        transport = await self.open()
        blocks = [bytes([n + 1]) * GRANULE_BYTES for n in range(5)]
        ticket, arrived = await self.want([len(b) for b in blocks])
        outcomes = await transport.send(
            ticket, [memoryview(b) for b in blocks], stall_deadline_ms=DEADLINE_MS
        )
        assert outcomes == [Outcome.HIT] * 5
        assert [bytes(view) for view in arrived] == blocks
        await transport.close()

    async def test_a_ticket_works_once(self) -> None:
        transport = await self.open()
        ticket = await self.offer([bytes(GRANULE_BYTES)] * 2)
        into = [memoryview(bytearray(GRANULE_BYTES)) for _ in range(2)]
        assert await self._fetch(transport, ticket, into) == {Outcome.HIT}
        assert await self._fetch(transport, ticket, into) == {Outcome.REFUSED}
        await transport.close()

    async def test_foreign_and_expired_tickets_are_refused_as_a_whole(self) -> None:
        transport = await self.open()
        real = await self.offer([b"\1" * GRANULE_BYTES] * 2)
        forged = Ticket(bytes(32), real.address, real.expires_ms)
        old = await self.offer([b"\1" * GRANULE_BYTES] * 2, expired=True)
        for ticket in (forged, old):
            into = [memoryview(bytearray(GRANULE_BYTES)) for _ in range(2)]
            assert await self._fetch(transport, ticket, into) == {Outcome.REFUSED}
            assert not any(any(view) for view in into), "bytes crossed on a bad ticket"
        await transport.close()

    async def test_a_ticket_for_reading_does_not_write(self) -> None:
        transport = await self.open()
        ticket = await self.offer([bytes(GRANULE_BYTES)])
        source = [memoryview(b"\1" * GRANULE_BYTES)]
        outcomes = await transport.send(ticket, source, stall_deadline_ms=DEADLINE_MS)
        assert outcomes == [Outcome.REFUSED]
        await transport.close()

    async def test_a_closed_transport_answers_without_raising(self) -> None:
        transport = await self.open()
        ticket = await self.offer([bytes(GRANULE_BYTES)])
        await transport.close()
        into = [memoryview(bytearray(GRANULE_BYTES))]
        ended = {Outcome.LATE, Outcome.REFUSED}
        assert await self._fetch(transport, ticket, into) <= ended
        await transport.close()
