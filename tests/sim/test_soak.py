"""Hours of a node's life in seconds: what is given out comes back, whatever its clients do.

The parts of a node are the real ones (arena, hasher, scrubber, movement, an NVMe tier in files, the
bulk port and sockets); the clock is simulated. Clients reserve, write, vanish, forget leases and
fall silent; the disk fails and hangs. At the end nobody is left, and nothing may be held.
"""

import asyncio
import errno
import gc
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.errors import KvStoreError
from kvstore.core.outcomes import Outcome
from kvstore.core.slots import SlotState
from kvstore.directory.events import TierKind
from kvstore.observe.metrics import NodeMetrics, PeerMetrics
from kvstore.service.bulk_port import BulkPort
from kvstore.service.clearing import clear
from kvstore.service.hashing import Hasher
from kvstore.service.movement import Lower, Movement, MovementLimits
from kvstore.service.node import HOUSEKEEPING_S
from kvstore.service.remote_sessions import RemoteSessions
from kvstore.service.reserver import Wanted
from kvstore.service.roots import RootInfo, keys_of
from kvstore.service.scrubbing import Scrubber
from kvstore.service.sessions import Session
from kvstore.service.store import Acquired
from kvstore.testing.devices import FaultyDisk
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.sums import block_sum
from kvstore.transfer.lanes import Lane
from kvstore.transport.base import Ticket
from kvstore.transport.bulk import BulkTransport
from tests.arena_fixture import ROOT, SHAPE, SmallStore, names, small_store
from tests.nvme_fixture import start
from tests.virtual_loop import VirtualLoop, run_virtually

BLOCKS = 48
PROMPTS = 24
LOCAL_CLIENTS, REMOTE_CLIENTS = 4, 2
LIMITS = MovementLimits(load_stall_ms=400, write_stall_ms=2_000)


class Soak:
    """One node's parts, and everybody who uses them."""

    def __init__(
        self, loop: VirtualLoop, small: SmallStore, tier: NvmeTier, disk: FaultyDisk
    ) -> None:
        self.loop, self.small, self.tier, self.disk = loop, small, tier, disk
        metrics = NodeMetrics(CollectorRegistry())
        self.hasher = Hasher(small.store, metrics)
        lowers = [Lower(TierKind.NVME, tier)]
        self.movement = Movement(small.store, self.hasher, lowers, metrics, LIMITS)
        self.port = BulkPort(small.table, PeerMetrics(CollectorRegistry()), self.now_ms)
        self.remote = RemoteSessions(small.store, self.port, session_ms=5_000)
        self.transport = BulkTransport(streams=2)
        self.hung = False
        self.numbers = 0
        self.done: Counter[str] = Counter()

    def now_ms(self) -> float:
        return self.loop.time() * 1_000

    def busy(self) -> bool:
        return self.tier.in_device > 0 and not self.hung

    # -- clients ---------------------------------------------------------------------------

    async def local_client(self, dice: random.Random) -> None:
        """One session after another; each ends well, or is killed while it may still write."""
        while True:
            self.numbers += 1
            token = self.numbers.to_bytes(16, "little")
            session, info = self.rooted(self.small.store.sessions.open(self.numbers, token))
            for _ in range(dice.randint(1, 12)):
                await asyncio.sleep(dice.expovariate(1 / 8))
                await self.request(session, info, dice)
            self.small.store.close(session, writers_gone=False)
            await asyncio.sleep(dice.choice([0.0, 0.0, 20.0]))
            self.small.store.close(session, writers_gone=True)
            self.small.store.sessions.forget(session)
            self.hasher.announce()
            self.done["sessions"] += 1

    def rooted(self, session: Session) -> tuple[Session, RootInfo]:
        info = self.small.table.roots.open(ROOT, SHAPE, domain="d")
        session.roots[ROOT] = info
        return session, info

    async def request(self, session: Session, info: RootInfo, dice: random.Random) -> None:
        prompt = names(dice.randint(1, 10), seed=dice.randrange(PROMPTS))
        answer = self.acquire(session, info, prompt, reserve=dice.choice([0, len(prompt)]))
        self.check(prompt[: answer.ready], answer.slots)
        reserved = list(zip(answer.reserved_names, answer.reserved_slots, strict=True))
        refs = [(slot, self.small.table.generation[slot]) for slot in answer.reserved_slots]
        await asyncio.sleep(dice.expovariate(2))
        for index, slot in reserved:
            self.fill(prompt[index], slot)
        keep = dice.randint(0, len(refs)) if dice.random() < 0.3 else len(refs)
        self.small.store.commit(session, info, refs[:keep], self.now_ms())
        if dice.random() < 0.9:  # else they stay reserved until the session ends
            self.small.store.abort(session, info, refs[keep:])
        self.hasher.wake()
        self.small.store.flush_requests()
        if dice.random() < 0.8:  # else the lease runs out
            self.small.store.release(session, [answer.lease])
        if dice.random() < 0.1:
            self.small.store.pins.pin(info, b"".join(prompt), 30_000, self.now_ms())
        if dice.random() < 0.1:
            packed = b"".join(prompt)
            wanted = Wanted(info, packed, keys_of(info, packed), 0, self.now_ms())
            loads = self.movement.promoter.prefetch(wanted, 1_000)
            self.movement.load(loads, Lane.PREFETCH)
        self.done["requests"] += 1
        self.done["blocks"] += len(answer.slots)
        self.done["loads"] += len(answer.loads)

    def acquire(
        self, session: Session, info: RootInfo, prompt: list[bytes], *, reserve: int
    ) -> Acquired:
        answer = self.small.store.acquire(
            session, info, b"".join(prompt), reserve=reserve, first_block=0,
            now_ms=self.now_ms(), pending_ms=1_000,
        )  # fmt: skip
        self.movement.hurry(answer.slots[answer.ready :])
        self.movement.load(answer.loads)
        return answer

    async def remote_client(self, dice: random.Random) -> None:
        """Reads and writes by tickets; some are never used, and no session says goodbye."""
        while True:
            session, info = self.rooted(self.remote.open("far", self.now_ms()))
            for _ in range(dice.randint(1, 4)):
                await asyncio.sleep(dice.expovariate(1))
                if session.closed:
                    break
                self.remote.heard(session, self.now_ms())
                prompt = names(dice.randint(1, 6), seed=dice.randrange(PROMPTS))
                answer = self.acquire(session, info, prompt, reserve=len(prompt))
                try:
                    await self.by_ticket(session, info, prompt, answer, dice)
                except KvStoreError:
                    self.done["refused"] += 1
            await asyncio.sleep(20)

    async def by_ticket(
        self, session: Session, info: RootInfo, prompt: list[bytes], answer: Acquired,
        dice: random.Random,
    ) -> None:  # fmt: skip
        table = self.small.table
        sealed = [
            slot for slot in answer.slots[: answer.ready] if table.state[slot] == SlotState.SEALED
        ]
        if sealed:
            ticket = self.port.lend(sealed, session=session.number, host="127.0.0.1")
            if dice.random() < 0.7:
                into = [memoryview(bytearray(SHAPE.block_bytes)) for _ in sealed]
                fetched = await self.transport.fetch(ticket, into, stall_deadline_ms=2_000)
                self.done["fetched"] += fetched.count(Outcome.HIT)
        if answer.reserved_slots and not session.closed:
            ticket = self.port.take(session, info, answer.reserved_slots, host="127.0.0.1")
            if dice.random() < 0.7:
                await self.send(session, info, [prompt[i] for i in answer.reserved_names], ticket)

    async def send(
        self, session: Session, info: RootInfo, wanted: list[bytes], ticket: Ticket
    ) -> None:
        """Fill what is on a ticket, and commit what came whole."""
        padding = bytes(SHAPE.block_bytes - SHAPE.payload_bytes)
        blocks = [memoryview(name[:1] * SHAPE.payload_bytes + padding) for name in wanted]
        sent = await self.transport.send(
            ticket, blocks, stall_deadline_ms=2_000,
            digest=lambda block: block_sum(block[: SHAPE.payload_bytes], SHAPE.shares),
        )  # fmt: skip
        arrived = sorted(session.arrived or {})
        refs = [(slot, self.small.table.generation[slot]) for slot in arrived]
        self.small.store.commit(session, info, refs, self.now_ms())
        self.hasher.seal_summed()
        self.hasher.announce()
        self.done["sent"] += sent.count(Outcome.HIT)

    # -- bytes -----------------------------------------------------------------------------

    def fill(self, name: bytes, slot: int) -> None:
        record = self.small.arena.record(slot)
        if self.small.table.state[slot] == SlotState.RESERVED and record.name == name:
            view = self.small.arena.block(record.offset, record.payload_bytes)
            view[:] = name[:1] * record.payload_bytes

    def check(self, prompt: list[bytes], slots: list[int]) -> None:
        """Hold what is leased and ready against what every writer of these names writes."""
        for name, slot in zip(prompt, slots, strict=False):
            record = self.small.arena.record(slot)
            got = bytes(self.small.arena.block(record.offset, record.payload_bytes))
            assert got == name[:1] * record.payload_bytes, "wrong bytes under a name"

    # -- the node's own tasks --------------------------------------------------------------

    async def keep_house(self) -> None:
        """What `Node._keep_house` does."""
        while True:
            self.small.store.expire(self.now_ms())
            if self.remote.expire(self.now_ms()):
                self.hasher.announce()
            self.port.expire(self.now_ms())
            await asyncio.sleep(HOUSEKEEPING_S)

    async def trouble(self, dice: random.Random) -> None:
        """A disk that fails for a minute, or hangs for one; and an operator who clears a root."""
        for what in cycle(["hang", "reads", "clear", "writes"]):
            await asyncio.sleep(dice.expovariate(1 / 150))
            self.done[what] += 1
            if what == "clear":
                await clear(self.small.store, [self.tier], None)
                continue
            if what == "hang":
                self.hung = True
                self.disk.hang()
            self.disk.fail_reads = errno.EIO if what == "reads" else 0
            self.disk.fail_writes = errno.ENOSPC if what == "writes" else 0
            await asyncio.sleep(60)
            self.well()

    def well(self) -> None:
        self.disk.fail_reads = self.disk.fail_writes = 0
        self.disk.release()
        self.hung = False

    def held(self) -> dict[str, object]:
        """Return everything that somebody holds: all of it empty where nobody is left."""
        table, store = self.small.table, self.small.store
        states = {state.name: table.counts[state] for state in SlotState if table.counts[state]}
        promoter = self.movement.promoter
        return {
            "states": {n: c for n, c in states.items() if n not in ("FREE", "SEALED")},
            "pins": [slot for slot, pins in enumerate(table.pins) if pins],
            "leases": len(store.leases),
            "sessions": store.sessions.numbers(),
            "remote": len(self.remote),
            "tickets": len(self.port._book),
            "reserved": (table.reserved_bytes, promoter.loader.reserved),
            "loading": (promoter._from, promoter._unwanted),
            "pinned": len(store.pins),
            "outdone": table.outdone,
            "unlisted": table.counts[SlotState.SEALED] - len(table.index),
            "used": table.used_bytes - table.counts[SlotState.SEALED] * SHAPE.block_bytes,
            "device": (self.tier.in_device, self.movement._draining),
        }


@asynccontextmanager
async def soak(loop: VirtualLoop, directory: Path) -> AsyncIterator[Soak]:
    disk = FaultyDisk()
    with small_store(BLOCKS, quota_blocks=BLOCKS // 2, max_slots=BLOCKS + 16) as small:
        loop.busy = lambda: True  # until the index is read
        tier = await start(directory, slots=171, device=disk)
        made = Soak(loop, small, tier, disk)
        loop.busy = made.busy
        await made.port.start("127.0.0.1:0")
        scrubber = Scrubber(small.table, made.hasher, bytes_per_s=256 << 10)
        own = [asyncio.create_task(work) for work in
               (made.hasher.run(), made.keep_house(), scrubber.run())]  # fmt: skip
        try:
            yield made
        finally:
            made.well()
            await made.transport.close()
            await made.port.stop()
            await made.movement.close()
            await tier.close()
            for task in own:
                task.cancel()
            await asyncio.gather(*own, return_exceptions=True)


async def live(loop: VirtualLoop, directory: Path, hours: float, seed: int) -> Counter[str]:
    """Let everybody live for so long, then leave; returns what was done."""
    async with soak(loop, directory) as node:
        own = asyncio.all_tasks()
        clients = [
            asyncio.create_task(work) for work in (
                *(node.local_client(random.Random(seed + n)) for n in range(LOCAL_CLIENTS)),
                *(node.remote_client(random.Random(seed - 1 - n)) for n in range(REMOTE_CLIENTS)),
                node.trouble(random.Random(seed)),
            )
        ]  # fmt: skip
        ended, _ = await asyncio.wait(
            clients, timeout=hours * 3_600, return_when=asyncio.FIRST_EXCEPTION
        )
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        for task in ended:
            task.result()
        node.well()
        store = node.small.store
        for number in store.sessions.numbers():
            session = store.sessions.by_number(number)
            if session is not None and session.arrived is None:  # the keeper saw them exit
                store.close(session, writers_gone=True)
                store.sessions.forget(session)
        await asyncio.sleep(120)  # every lease, pin, ticket, claim and remote session is over
        nothing = {"states": {}, "pins": [], "leases": 0, "sessions": set(), "remote": 0,
                   "tickets": 0, "reserved": (0, set()), "loading": ({}, set()), "pinned": 0,
                   "outdone": set(), "unlisted": 0, "used": 0, "device": (0, set())}  # fmt: skip
        assert node.held() == nothing
        assert asyncio.all_tasks() <= own, "tasks that nobody ended"
        return node.done


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("hours", "seed"), [(0.5, 7), pytest.param(8, 11, marks=pytest.mark.slow)])
def test_nothing_is_held_when_everybody_has_left(tmp_path: Path, hours: float, seed: int) -> None:
    gc.collect()  # what other tests left is not ours
    before = len(os.listdir("/proc/self/fd"))
    done = run_virtually(lambda loop: live(loop, tmp_path, hours, seed))
    assert len(os.listdir("/proc/self/fd")) <= before, "descriptors that nobody closed"
    assert done["requests"] > hours * 1_000 and done["sessions"] > hours * 100
    assert min(done[what] for what in ("blocks", "loads", "fetched", "sent")) > hours * 20
    assert min(done[what] for what in ("hang", "reads", "clear", "writes")) > hours
