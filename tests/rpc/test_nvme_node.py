"""A real node with an NVMe tier: blocks go down, come back up, and outlive every process."""

import asyncio
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from kvstore.client import Client
from kvstore.core.errors import Unreachable
from kvstore.core.outcomes import MissReason, SettleOutcome
from kvstore.directory.events import Changed, Ended, Event, TierKind
from kvstore.router.members import Member
from kvstore.router.watch_source import WatchSource
from kvstore.testing.node import RunningNode, start_node
from tests import patience
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.session_process import PAYLOAD, connect, names_of

DONE = SettleOutcome.DONE
ARENA_BLOCKS = 64
ARENA_BYTES = ARENA_BLOCKS * PAYLOAD


def options(directory: Path) -> tuple[str, ...]:
    return ("--nvme", str(directory), "--nvme-bytes", "256MiB", "--policy", "lru")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RunningNode]:
    with start_node(arena_bytes=ARENA_BYTES, options=options(tmp_path)) as running:
        yield running


@contextmanager
def living(run_dir: Path, disk: Path, label: str) -> Iterator[tuple[RunningNode, Client]]:
    """Run one life of a host: keeper, node and a client."""
    with (
        start_node(run_dir, arena_bytes=ARENA_BYTES, options=options(disk)) as running,
        connect(running.run_dir, label) as client,
    ):
        yield running, client


def payloads(prompt: int, count: int) -> list[bytes]:
    return [bytes([prompt, i]) * (PAYLOAD // 2) for i in range(count)]


def until(true: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < ends, what
        time.sleep(0.01)


def blocks_below(client: Client) -> int:
    return client.stats().tiers[TierKind.NVME].blocks


def wait_for_blocks(client: Client, least: int) -> None:
    """Wait until the node has read the index of its disk."""
    until(lambda: blocks_below(client) >= least, "blocks were lost")


def put(client: Client, prompt: int, count: int) -> None:
    """Put a prompt and wait until it is written below."""
    before = blocks_below(client)
    assert client.put(names_of(client, prompt, count), payloads(prompt, count)) == [DONE] * count
    until(lambda: blocks_below(client) == before + count, "the blocks were not written below")


def drive_out(client: Client, first: int) -> None:
    """Fill the arena with other prompts, so that nothing of before is left in it."""
    for prompt in range(first, first + 4):
        put(client, prompt, ARENA_BLOCKS // 4)


def test_evicted_blocks_come_back_from_disk(node: RunningNode) -> None:
    with connect(node.run_dir, "back") as client:
        put(client, 1, 8)
        drive_out(client, 10)
        names = names_of(client, 1, 8)
        found = client.lookup(names)
        assert (found.prefix, set(found.tiers)) == (8, {frozenset({TierKind.NVME})})
        acquired = client.acquire(names, pending_ms=PATIENCE_MS)
        assert (len(acquired.ready), acquired.reason) == (0, MissReason.NONE)
        assert {ref.tier for ref in acquired.pending} == {TierKind.NVME}
        assert client.wait_ready(acquired.pending) == 8
        for ref, payload in zip(acquired.pending, payloads(1, 8), strict=True):
            assert bytes(client.view(ref)[:PAYLOAD]) == payload
            assert client.still(ref)
        client.settle(release=[acquired.lease])
        again = client.acquire(names)
        assert ([ref.tier for ref in again.ready], again.pending) == ([TierKind.DRAM] * 8, [])
        client.settle(release=[again.lease])
        assert client.get(names) == payloads(1, 8)


def test_everything_is_found_after_the_host_was_restarted(tmp_path: Path) -> None:
    run_dir, disk = tmp_path / "run", tmp_path / "disk"
    with living(run_dir, disk, "restart") as (_, client):
        # Not waited for: a node that ends in good order writes what is not below yet.
        names = names_of(client, 1, 32)
        assert client.put(names, payloads(1, 32)) == [DONE] * 32
    with living(run_dir, disk, "restart") as (_, client):
        until(lambda: blocks_below(client) == 32, "the index was not read")
        assert client.get(names) == payloads(1, 32)


def test_what_was_written_survives_kill_9_of_everything(tmp_path: Path) -> None:
    run_dir, disk = tmp_path / "run", tmp_path / "disk"
    for life in range(3):
        with living(run_dir, disk, "kill") as (running, client):
            wait_for_blocks(client, 8 * life)
            for prompt in range(1, life + 1):
                assert client.get(names_of(client, prompt, 8)) == payloads(prompt, 8)
            for under_way in range(100, 100 + life):
                names = names_of(client, under_way, 40)
                # Each for itself: what was under way is whole or absent, never wrong.
                for name, payload in zip(names, payloads(under_way, 40), strict=True):
                    assert client.get([name]) in ([], [payload])
            put(client, life + 1, 8)
            client.put(names_of(client, 100 + life, 40), payloads(100 + life, 40))
            running.kill_keeper()


def test_a_killed_node_finds_its_disk_again(node: RunningNode) -> None:
    with connect(node.run_dir, "node") as client:
        put(client, 1, 8)
        drive_out(client, 10)
        node.wait_restarted(node.kill_node())
        until(lambda: blocks_below(client) == 8 + ARENA_BLOCKS, "the index was not read")
        assert client.get(names_of(client, 1, 8)) == payloads(1, 8)


def test_spoilt_bytes_on_disk_are_a_miss_with_its_reason(node: RunningNode, tmp_path: Path) -> None:
    with connect(node.run_dir, "spoilt") as client:
        put(client, 1, 4)
        drive_out(client, 10)
        for path in tmp_path.glob("segment-*.data"):
            raw = bytearray(path.read_bytes())
            at = raw.find(payloads(1, 4)[2][:64])
            if at >= 0:
                raw[at] ^= 1
                path.write_bytes(raw)
        names = names_of(client, 1, 4)
        assert client.get(names) == payloads(1, 2)
        acquired = client.acquire(names)
        assert (len(acquired.ready), acquired.reason) == (2, MissReason.CORRUPT)
        client.settle(release=[acquired.lease])
        assert client.stats().tiers[TierKind.NVME].corrupt == 1


def test_prefetch_brings_blocks_up_before_anyone_asks(node: RunningNode) -> None:
    with connect(node.run_dir, "prefetch") as client:
        put(client, 1, 8)
        assert client.prefetch(names_of(client, 1, 8)) == 0, "all are here"
        drive_out(client, 10)
        names = names_of(client, 1, 8)
        assert client.prefetch(names) == 8

        def here() -> bool:
            return all(TierKind.DRAM in tiers for tiers in client.lookup(names).tiers)

        until(here, "the blocks did not come up")
        acquired = client.acquire(names)
        assert (len(acquired.ready), acquired.pending) == (8, [])
        client.settle(release=[acquired.lease])


def test_one_flight_serves_all_who_ask(node: RunningNode) -> None:
    with connect(node.run_dir, "flight") as one, connect(node.run_dir, "flight") as other:
        put(one, 1, 16)
        drive_out(one, 10)
        names = names_of(one, 1, 16)
        first = one.acquire(names, pending_ms=PATIENCE_MS)
        second = other.acquire(names, pending_ms=PATIENCE_MS)
        slots = [(ref.slot, ref.generation) for ref in first.pending]
        assert [(r.slot, r.generation) for r in [*second.ready, *second.pending]] == slots
        assert one.wait_ready(first.pending) == 16
        assert other.wait_ready(second.pending) == len(second.pending)
        one.settle(release=[first.lease])
        other.settle(release=[second.lease])
        assert one.stats().tiers[TierKind.NVME].hits == 16, "each block was read from disk once"


def test_a_client_that_dies_waiting_leaves_nothing_behind(node: RunningNode) -> None:
    with connect(node.run_dir, "dies") as client:
        put(client, 1, 16)
        drive_out(client, 10)
        waiting = connect(node.run_dir, "dies")
        acquired = waiting.acquire(names_of(client, 1, 16), pending_ms=PATIENCE_MS)
        assert acquired.pending
        waiting.close()
        until(lambda: client.stats().leases == 0, "leases are left")
        assert client.get(names_of(client, 1, 16)) == payloads(1, 16)
        until(lambda: client.stats().slots["draining"] == 0, "slots are left")
        assert client.stats().slots["reserved"] == 0


async def test_watchers_learn_what_is_on_disk(node: RunningNode) -> None:
    def fill(prompt: int, count: int) -> None:
        with connect(node.run_dir, "watch") as client:
            put(client, prompt, count)

    await asyncio.to_thread(fill, 1, 8)
    source = WatchSource(Member("node", node.name, node.listen))
    snapshot: set[bytes] = set()
    live: set[bytes] = set()
    into = snapshot

    async def follow() -> None:
        nonlocal into
        async for event in source.events():
            into = _note(event, snapshot, live, into)

    following = asyncio.create_task(follow())
    try:
        await patience.until(lambda: len(snapshot) == 8)
        await asyncio.to_thread(fill, 2, 4)
        await patience.until(lambda: len(live) == 4)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert (len(snapshot), len(live)) == (8, 4)


def _note(event: Event, snapshot: set[bytes], live: set[bytes], into: set[bytes]) -> set[bytes]:
    if isinstance(event, Ended):
        return live
    if isinstance(event, Changed) and event.tier is TierKind.NVME:
        assert event.block_bytes == PAYLOAD or event.deleted
        into.update(event.names)
    return into


def test_a_directory_in_use_is_an_error_that_names_it(node: RunningNode, tmp_path: Path) -> None:
    with (
        pytest.raises(Unreachable, match=rf"NVMe directory {tmp_path} is used by another node"),
        start_node(arena_bytes=ARENA_BYTES, options=options(tmp_path), deadline_s=PATIENCE_S),
    ):
        pass


def test_a_stopped_disk_node_costs_a_deadline_and_no_more(node: RunningNode) -> None:
    with connect(node.run_dir, "stopped") as client:
        put(client, 1, 4)
        node.signal_node(signal.SIGSTOP)
        with pytest.raises(Unreachable):
            client.acquire(names_of(client, 1, 4), deadline_ms=200)
        os.kill(node.node_pid, signal.SIGCONT)
        assert client.get(names_of(client, 1, 4)) == payloads(1, 4)


def test_cleared_blocks_are_gone_from_every_tier_and_stay_gone(tmp_path: Path) -> None:
    run_dir, disk = tmp_path / "run", tmp_path / "disk"
    with living(run_dir, disk, "clear") as (running, client):
        put(client, 1, 8)
        with connect(running.run_dir, "other") as other:
            put(other, 2, 4)
            assert client.clear() == 8 + 8
            assert client.get(names_of(client, 1, 8)) == []
            assert other.get(names_of(other, 2, 4)) == payloads(2, 4)
    with living(run_dir, disk, "clear") as (_, client):
        wait_for_blocks(client, 4)
        assert blocks_below(client) == 4
        assert client.clear(everything=True) == 4


def test_pinned_blocks_stay_in_memory(node: RunningNode) -> None:
    with connect(node.run_dir, "pin") as client:
        put(client, 1, 8)
        names = names_of(client, 1, 8)
        assert client.pin(names, ttl_ms=60_000) == 8
        drive_out(client, 10)
        assert len(client.acquire(names).ready) == 8
        assert client.pin(names[:4], ttl_ms=0) == 4


def test_a_domain_keeps_within_its_quota_in_every_tier(tmp_path: Path) -> None:
    rule = f"domain:default:dram={8 * PAYLOAD},nvme={12 * (PAYLOAD + 4096)}"
    flags = (*options(tmp_path), "--quota", rule)
    with (
        start_node(arena_bytes=ARENA_BYTES, options=flags) as node,
        connect(node.run_dir, "quota") as client,
    ):
        for prompt in range(4):
            until(partial(stored, client, prompt, 6), "no room within the quota")
            until(partial(holds_below, client, min(12, 6 * (prompt + 1))), "not written below")
        tiers = client.stats().tiers
        assert tiers[TierKind.DRAM].used_bytes <= 8 * PAYLOAD
        until(lambda: blocks_below(client) == 12, "the quota of the disk is not what it holds")
        beyond = client.acquire(names_of(client, 9, 12), reserve=12)
        assert (len(beyond.reserved), beyond.reserve_reason) == (8, MissReason.QUOTA)
        assert client.settle(abort=[one.slot for one in beyond.reserved]).abort == [DONE] * 8
        metric = 'kvstore_tier_domain_bytes{domain="default",tier="nvme"}'
        until(lambda: sample(node, metric) == 12 * (PAYLOAD + 4096), "the metric says another")
        refused = 'kvstore_tier_quota_refusals_total{tier="dram"}'
        until(lambda: sample(node, refused) >= 1, "no refusal was counted")


def stored(client: Client, prompt: int, count: int) -> bool:
    """Put what is not there yet: slots that are still being written below make no room."""
    names = names_of(client, prompt, count)
    client.put(names, payloads(prompt, count))
    return client.lookup(names).prefix == count


def holds_below(client: Client, least: int) -> bool:
    return blocks_below(client) >= least


def sample(node: RunningNode, name: str) -> float:
    with urllib.request.urlopen(f"http://{node.metrics}/metrics", timeout=PATIENCE_S) as page:
        lines = page.read().decode().splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)), -1.0)


def test_a_pinned_block_stays_on_disk_until_its_node_ends(tmp_path: Path) -> None:
    flags = ("--nvme", str(tmp_path), "--nvme-bytes", "16MiB", "--policy", "lru")
    with (
        start_node(arena_bytes=ARENA_BYTES, options=flags) as node,
        connect(node.run_dir, "pin") as client,
    ):
        names = names_of(client, 1, 4)
        assert client.put(names, payloads(1, 4)) == [DONE] * 4
        until(lambda: blocks_below(client) == 4, "not written below")
        assert client.pin(names, ttl_ms=60_000) == 4
        prompts = count(2)
        while client.stats().tiers[TierKind.NVME].evictions < 20:  # what the disk has no room for
            prompt = next(prompts)
            client.put(names_of(client, prompt, 16), payloads(prompt, 16))
        assert all(TierKind.NVME in where for where in client.lookup(names).tiers)
        node.wait_restarted(node.kill_node())
        until(lambda: sample(node, "kvstore_node_pinned_blocks") == 0, "a pin outlived its node")
