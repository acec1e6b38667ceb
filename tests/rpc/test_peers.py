"""Real nodes that lend each other blocks, and neighbours that are dead, hung or wrong."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvstore.client import Client
from kvstore.core.outcomes import MissReason, SettleOutcome
from kvstore.directory.events import TierKind
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.session_process import PAYLOAD, connect, names_of

DONE, PEER = SettleOutcome.DONE, TierKind.PEER


class Hosts:
    """Nodes that share a key and a list of peers."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.list = directory / "peers.json"
        self.key = directory / "cluster.key"
        self.key.write_bytes(os.urandom(32))
        self.key.chmod(0o600)
        self._stack = stack
        self.nodes: list[RunningNode] = []

    def start(self, *more: str) -> RunningNode:
        options = ("--peers", str(self.list), "--cluster-key-file", str(self.key), *more)
        name = f"node-{len(self.nodes)}"
        node = self._stack.enter_context(
            start_node(arena_bytes=64 * PAYLOAD, name=name, options=options)
        )
        self.nodes.append(node)
        self.tell()
        return node

    def tell(self) -> None:
        listed = [{"name": node.name, "address": node.listen} for node in self.nodes]
        fresh = self.list.with_suffix(".new")
        fresh.write_text(json.dumps({"peers": listed}))
        fresh.replace(self.list)

    def connect(self, node: RunningNode) -> Client:
        return self._stack.enter_context(connect(node.run_dir, "shared"))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with ExitStack() as stack:
        yield Hosts(tmp_path, stack)


def payloads(prompt: int, count: int) -> list[bytes]:
    return [bytes([prompt, i]) * (PAYLOAD // 2) for i in range(count)]


def until(true: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < ends, what
        time.sleep(0.01)


def put(client: Client, prompt: int, count: int) -> None:
    assert client.put(names_of(client, prompt, count), payloads(prompt, count)) == [DONE] * count


def seen(client: Client, prompt: int, count: int) -> bool:
    """Whether the client's node knows that the whole prompt lies at a neighbour."""
    found = client.lookup(names_of(client, prompt, count))
    return found.prefix == count and all(PEER in tiers for tiers in found.tiers)


def test_a_neighbours_blocks_are_fetched_and_kept(hosts: Hosts) -> None:
    one, two = hosts.start(), hosts.start()
    here, there = hosts.connect(one), hosts.connect(two)
    put(there, 1, 20)
    until(lambda: seen(here, 1, 20), "the neighbour's blocks were not seen")
    names = names_of(here, 1, 20)
    acquired = here.acquire(names, pending_ms=PATIENCE_MS)
    assert {ref.tier for ref in acquired.pending} == {PEER}
    assert (len(acquired.pending), acquired.reason) == (20, MissReason.NONE)
    assert here.wait_ready(acquired.pending) == 20
    here.settle(release=[acquired.lease])
    assert here.get(names) == payloads(1, 20)
    again = here.acquire(names)
    assert [ref.tier for ref in again.ready] == [TierKind.DRAM] * 20, "it has its own copy now"
    here.settle(release=[again.lease])
    # The copy is a sealed block like any other: the first node may take it back from here.
    until(lambda: seen(there, 1, 20), "what was fetched was not published")


def test_what_lies_on_a_neighbours_disk_is_lent_too(hosts: Hosts, tmp_path: Path) -> None:
    one = hosts.start()
    two = hosts.start("--nvme", str(tmp_path / "disk"), "--nvme-bytes", "64MiB", "--policy", "lru")
    here, there = hosts.connect(one), hosts.connect(two)
    put(there, 1, 8)
    until(lambda: there.stats().tiers[TierKind.NVME].blocks == 8, "not written")
    for prompt in range(2, 6):
        put(there, prompt, 16)  # the arena holds 64
        until(lambda: there.stats().slots["committed"] == 0, "not sealed")
    tiers = there.lookup(names_of(there, 1, 8)).tiers
    assert all(TierKind.DRAM not in held for held in tiers), "the test wants them evicted"
    until(lambda: seen(here, 1, 8), "the neighbour's disk was not seen")
    assert here.get(names_of(here, 1, 8), deadline_ms=PATIENCE_MS) == payloads(1, 8)


def test_a_dead_neighbour_is_forgotten_and_a_second_copy_read(hosts: Hosts) -> None:
    one, two, three = hosts.start(), hosts.start(), hosts.start()
    here, there, third = hosts.connect(one), hosts.connect(two), hosts.connect(three)
    put(there, 1, 16)
    until(lambda: seen(third, 1, 16), "not seen")
    assert third.get(names_of(third, 1, 16), deadline_ms=PATIENCE_MS) == payloads(1, 16)
    put(third, 2, 1)  # somebody to ask first or second, for either of the two
    until(lambda: seen(here, 1, 16) and seen(here, 2, 1), "not seen")
    two.kill_keeper()
    assert here.get(names_of(here, 1, 16), deadline_ms=PATIENCE_MS) == payloads(1, 16)
    until(lambda: len(here.lookup(names_of(here, 1, 16)).tiers[0]) > 0, "a copy lives")
    assert here.get(names_of(here, 2, 1), deadline_ms=PATIENCE_MS) == payloads(2, 1)


def test_a_dead_neighbours_blocks_are_not_claimed_after_a_second(hosts: Hosts) -> None:
    one, two = hosts.start(), hosts.start()
    here, there = hosts.connect(one), hosts.connect(two)
    put(there, 1, 4)
    until(lambda: seen(here, 1, 4), "not seen")
    two.signal_node(signal.SIGSTOP)
    try:
        # At once: one stall deadline, and the request goes on without it.
        assert here.get(names_of(here, 1, 4), deadline_ms=PATIENCE_MS) == []
        until(lambda: here.lookup(names_of(here, 1, 4)).prefix == 0, "still claimed")
    finally:
        two.signal_node(signal.SIGCONT)
    until(lambda: seen(here, 1, 4), "a neighbour that came back was not seen again")
    # Its breaker lets somebody through again within seconds.
    until(lambda: here.get(names_of(here, 1, 4)) == payloads(1, 4), "not read")


def test_a_neighbour_whose_memory_is_spoilt_is_never_believed(hosts: Hosts) -> None:
    one, two = hosts.start(), hosts.start()
    here, there = hosts.connect(one), hosts.connect(two)
    put(there, 1, 4)
    until(lambda: seen(here, 1, 4), "not seen")
    acquired = there.acquire(names_of(there, 1, 4))
    there.view(acquired.ready[2])[77] ^= 1
    there.settle(release=[acquired.lease])
    assert here.get(names_of(here, 1, 4), deadline_ms=PATIENCE_MS) == payloads(1, 4)[:2]
    assert here.stats().slots["committed"] == 0


def test_a_list_that_is_wrong_changes_nothing(hosts: Hosts) -> None:
    one, two = hosts.start(), hosts.start()
    here, there = hosts.connect(one), hosts.connect(two)
    put(there, 1, 2)
    until(lambda: seen(here, 1, 2), "not seen")
    hosts.list.write_text('{"peers": [{"name": "node-1"}]}')
    until(lambda: "wants an address" in one.log_tail(), "the error was not logged")
    assert seen(here, 1, 2)
    hosts.nodes.remove(two)
    hosts.tell()
    until(lambda: here.lookup(names_of(here, 1, 2)).prefix == 0, "a peer that left is claimed")
