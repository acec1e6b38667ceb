"""Real nodes over one shared directory: blocks outlive every process, and other nodes find them."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from kvstore.client import Client
from kvstore.core.outcomes import SettleOutcome
from kvstore.directory.events import TierKind
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.session_process import PAYLOAD, connect, names_of

DONE, FILES = SettleOutcome.DONE, TierKind.FILES


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., tuple[RunningNode, Client]]]:
    key = tmp_path / "cluster.key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    shared = ("--files", str(tmp_path / "shared"), "--files-bytes", "64MiB")
    with ExitStack() as stack:

        def start(*more: str) -> tuple[RunningNode, Client]:
            options = ("--cluster-key-file", str(key), "--policy", "lru", *shared, *more)
            node = stack.enter_context(start_node(arena_bytes=64 * PAYLOAD, options=options))
            return node, stack.enter_context(connect(node.run_dir, "shared"))

        yield start


def payloads(prompt: int, count: int) -> list[bytes]:
    return [bytes([prompt, i]) * (PAYLOAD // 2) for i in range(count)]


def until(true: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < ends, what
        time.sleep(0.01)


def blocks(client: Client) -> int:
    return client.stats().tiers[FILES].blocks


def stored(client: Client, prompt: int, count: int) -> bool:
    """Put what is not there yet: slots that are still being written elsewhere make no room."""
    names = names_of(client, prompt, count)
    client.put(names, payloads(prompt, count))
    return client.lookup(names).prefix == count


def test_blocks_outlive_every_process_and_host(
    cluster: Callable[..., tuple[RunningNode, Client]], tmp_path: Path
) -> None:
    node, client = cluster()
    names = names_of(client, 1, 16)
    assert client.put(names, payloads(1, 16)) == [DONE] * 16
    until(lambda: blocks(client) == 16, "not written")
    client.close()
    node.stop()  # keeper, node, arena and run directory are gone: another host starts
    _, other = cluster()
    until(lambda: blocks(other) == 16, "not found")
    found = other.lookup(names)
    assert (found.prefix, set(found.tiers)) == (16, {frozenset({FILES})})
    assert other.get(names, deadline_ms=PATIENCE_MS) == payloads(1, 16)
    spoilt = next((tmp_path / "shared").rglob("*.block"))
    assert other.stats().tiers[FILES].hits == 16
    assert other.clear() == 32, "in memory and in the files"
    assert not spoilt.exists()


def test_a_spoilt_file_is_a_miss_and_never_a_block(
    cluster: Callable[..., tuple[RunningNode, Client]], tmp_path: Path
) -> None:
    node, client = cluster()
    assert client.put(names_of(client, 1, 4), payloads(1, 4)) == [DONE] * 4
    until(lambda: blocks(client) == 4, "not written")
    client.close()
    node.stop()
    for path in (tmp_path / "shared").rglob("*.block"):
        content = bytearray(path.read_bytes())
        content[10_000] ^= 4
        path.write_bytes(content)
    _, other = cluster()
    until(lambda: blocks(other) == 4, "not found")
    assert other.get(names_of(other, 1, 4), deadline_ms=PATIENCE_MS) == []
    assert other.stats().tiers[FILES].corrupt == 4


def test_a_block_goes_on_to_the_next_tier_when_one_does_not_give_it(
    cluster: Callable[..., tuple[RunningNode, Client]], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    node, client = cluster("--nvme", str(disk), "--nvme-bytes", "64MiB")
    assert client.put(names_of(client, 1, 8), payloads(1, 8)) == [DONE] * 8
    until(lambda: blocks(client) == client.stats().tiers[TierKind.NVME].blocks == 8, "not written")
    client.close()
    node.stop()
    for path in disk.glob("*.data"):  # every block on the disk is spoilt
        content = bytearray(path.read_bytes())
        for at in range(8_192, len(content), PAYLOAD // 2):
            content[at] ^= 1
        path.write_bytes(content)
    _, other = cluster("--nvme", str(disk), "--nvme-bytes", "64MiB")
    until(lambda: blocks(other) == other.stats().tiers[TierKind.NVME].blocks == 8, "not found")
    assert other.get(names_of(other, 1, 8), deadline_ms=PATIENCE_MS) == payloads(1, 8)
    stats = other.stats().tiers
    assert (stats[TierKind.NVME].corrupt, stats[FILES].hits) == (8, 8)


def test_a_directory_taken_away_costs_nobody_a_wrong_byte(
    cluster: Callable[..., tuple[RunningNode, Client]], tmp_path: Path
) -> None:
    _, client = cluster()
    names = names_of(client, 1, 8)
    assert client.put(names, payloads(1, 8)) == [DONE] * 8
    until(lambda: blocks(client) == 8, "not written")
    shutil.rmtree(tmp_path / "shared")
    for prompt in range(2, 7):  # drive the first prompt out of memory
        until(partial(stored, client, prompt, 16), "not stored")
    assert client.get(names) == []
    until(lambda: any((tmp_path / "shared").rglob("*.block")), "the tree was not made again")
