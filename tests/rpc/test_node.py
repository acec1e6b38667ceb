"""A real keeper (`kvstore.service.keeper`, `child`, `keeper_sessions`) with a real cache node.

Restarts, corruption, hanging, permissions and what is left behind; the calls themselves
(`kvstore.service.servicer`) are tested through the client and in test_bad_input.py.
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.client import Client
from kvstore.core.errors import Refused
from kvstore.core.names import BlockName
from kvstore.core.outcomes import MissReason, Outcome, SettleOutcome
from kvstore.directory.events import Began, Changed, Ended, Marked, TierKind
from kvstore.directory.publisher import xor_prefixes
from kvstore.rpc.channel import open_channel
from kvstore.rpc.convert import event_from_reply
from kvstore.rpc.v1 import cache_pb2_grpc, watch_pb2
from kvstore.testing.node import RunningNode, new_run_dir, start_node
from kvstore.transport.arena import ArenaMapping
from kvstore.transport.session_socket import Hello, connect_session
from tests.patience import PATIENCE_MS, PATIENCE_S, until_so
from tests.processes import REPOSITORY, started
from tests.session_process import PAYLOAD, connect, names_of

ARENA = 16 << 20


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningNode]:
    """A node for tests that do it no harm."""
    with start_node(arena_bytes=ARENA) as node:
        yield node


@pytest.fixture
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=ARENA) as running:
        yield running


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short private directory that is there when the keeper has gone."""
    directory = new_run_dir()
    yield directory
    shutil.rmtree(directory)


def blocks(count: int) -> list[bytes]:
    return [os.urandom(PAYLOAD) for _ in range(count)]


def until_sealed(client: Client, count: int) -> None:
    """Wait until the node has hashed `count` blocks."""
    ends = time.monotonic() + PATIENCE_S
    while client.stats().slots["sealed"] < count:
        assert time.monotonic() < ends, client.stats()
        time.sleep(0.01)


def arena_of(node: RunningNode) -> ArenaMapping:
    """Map the arena for writing, as only a test does, through a session of its own."""
    path = str(node.run_dir / "keeper.sock")
    _, fd, sock = connect_session(path, Hello("test", (os.getpid(),)), deadline_ms=PATIENCE_MS)
    try:
        return ArenaMapping(fd, owner=True)
    finally:
        os.close(fd)
        sock.close()


def test_sealed_blocks_outlive_a_killed_node(node: RunningNode) -> None:
    with connect(node.run_dir, "killed") as client:
        names, payloads = names_of(client, 1, 20), blocks(20)
        client.put(names, payloads)
        until_sealed(client, 20)
        for expected in (2, 3):
            assert node.wait_restarted(node.kill_node()) == expected
            assert client.get(names) == payloads
        assert client.stats().tiers[TierKind.DRAM].corrupt == 0
        facts = node.facts()
        assert facts["listen"] == node.listen, "the TCP port moved"


def test_a_corrupted_block_is_a_counted_miss_after_a_restart(node: RunningNode) -> None:
    with connect(node.run_dir, "corrupt") as client:
        names, payloads = names_of(client, 2, 6), blocks(6)
        client.put(names, payloads)
        until_sealed(client, 6)
        arena = arena_of(node)
        [slot] = [s for s in arena.slots() if arena.record(s).name == names[3]]
        arena.block(arena.record(slot).offset, PAYLOAD)[PAYLOAD // 2] ^= 0x10
        arena.close()
        node.wait_restarted(node.kill_node())
        acquired = client.acquire(names, deadline_ms=PATIENCE_MS)
        assert len(acquired.ready) == 3
        assert acquired.reason in (MissReason.CORRUPT, MissReason.ABSENT)
        assert client.get(names) == payloads[:3]
        assert client.stats().tiers[TierKind.DRAM].corrupt == 1
        assert client.put(names, payloads)[3] is SettleOutcome.DONE
        assert client.get(names) == payloads


def test_a_reservation_of_a_living_session_outlives_the_node(node: RunningNode) -> None:
    with connect(node.run_dir, "writing") as client:
        names = names_of(client, 3, 2)
        acquired = client.acquire(names, reserve=2)
        first, second = (item.slot for item in acquired.reserved)
        client.view(first)[:] = b"a" * PAYLOAD
        node.wait_restarted(node.kill_node())
        client.view(second)[:] = b"b" * PAYLOAD
        settled = client.settle(commit=[first, second], deadline_ms=PATIENCE_MS)
        assert settled.commit == [SettleOutcome.DONE] * 2
        assert client.get(names) == [b"a" * PAYLOAD, b"b" * PAYLOAD]


def until_sessions(client: Client, count: int) -> None:
    ends = time.monotonic() + PATIENCE_S
    while (sessions := client.stats().sessions) != count:
        assert time.monotonic() < ends, f"{sessions} sessions, not {count}"
        time.sleep(0.01)


def test_a_writer_that_lost_its_socket_keeps_its_slots_until_it_exits(node: RunningNode) -> None:
    """The process may still be writing: its slot goes to nobody, also over a restart."""
    script = str(REPOSITORY / "tests" / "lingering_writer.py")
    with (
        connect(node.run_dir, "linger") as watcher,
        started([script, str(node.run_dir), "linger"]) as writer,
    ):
        assert writer.ready == {"reserved": 1}
        for _ in range(2):
            until_sessions(watcher, 1)  # its socket is closed already; the keeper hears of it soon
            assert watcher.stats().reserved_bytes == PAYLOAD
            node.wait_restarted(node.kill_node())
            watcher.lookup([])
        writer.kill()
        ends = time.monotonic() + PATIENCE_S
        while watcher.stats().reserved_bytes:
            assert time.monotonic() < ends, "a dead writer's slot was not given back"
            time.sleep(0.01)


def test_a_hanging_node_is_replaced() -> None:
    with (
        start_node(arena_bytes=ARENA, options=["--hang-ms", "500"]) as node,
        connect(node.run_dir, "hang") as client,
    ):
        names, payloads = names_of(client, 5, 3), blocks(3)
        client.put(names, payloads)
        until_sealed(client, 3)
        incarnation = node.incarnation
        node.signal_node(signal.SIGSTOP)
        node.wait_restarted(incarnation)
        assert client.get(names) == payloads


def test_watch_tells_what_is_held_and_every_change(shared: RunningNode) -> None:
    with connect(shared.run_dir, "watch") as client:
        names, payloads = names_of(client, 6, 5), blocks(5)
        client.put(names[:2], payloads[:2])
        seen = asyncio.run(_watch(shared, client, names, payloads))
        assert seen >= set(names)


async def _watch(
    node: RunningNode, client: Client, names: list[BlockName], payloads: list[bytes]
) -> set[BlockName]:
    """Follow the node until a mark agrees with everything seen, after more was put."""
    held: set[tuple[bytes, BlockName]] = set()
    kinds: list[type] = []
    async with asyncio.timeout(PATIENCE_S), open_channel(node.listen) as channel:
        stub = cache_pb2_grpc.CacheNodeStub(channel)
        async for reply in stub.Watch(watch_pb2.WatchRequest(subscriber="test")):
            event = event_from_reply(reply)
            kinds.append(type(event))
            if isinstance(event, Changed):
                blocks = {(event.root, name) for name in event.names}
                held = held - blocks if event.deleted else held | blocks
            if isinstance(event, Ended):
                await asyncio.to_thread(client.put, names, payloads)
            if isinstance(event, Marked) and event.digests:
                xor = 0
                for root, name in held:
                    xor ^= xor_prefixes(root, [name])  # type: ignore[arg-type]
                assert event.digests[0].count == len(held)
                assert event.digests[0].xor_prefixes == xor
                if held >= {(client.root, name) for name in names}:
                    break
    assert kinds[0] is Began
    return {name for _, name in held}


def test_wait_and_lookup_see_what_another_session_makes(shared: RunningNode) -> None:
    with connect(shared.run_dir, "wait") as writer, connect(shared.run_dir, "wait") as reader:
        names = names_of(writer, 7, 2)
        acquired = writer.acquire(names[:1], reserve=1)
        assert reader.wait(names, deadline_ms=20) == [Outcome.LATE, Outcome.MISS]
        assert reader.acquire(names).reason is MissReason.COMPUTING
        writer.settle(commit=[item.slot for item in acquired.reserved])
        assert reader.wait(names[:1], deadline_ms=PATIENCE_MS) == [Outcome.HIT]
        assert reader.lookup(names).prefix == 1


def test_the_node_is_healthy_and_shows_its_metrics(shared: RunningNode) -> None:
    with connect(shared.run_dir, "metrics") as client:
        names = names_of(client, 8, 3)
        client.put(names, blocks(3))
        client.get(names)

        async def check() -> int:
            async with open_channel(shared.listen) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
                return int(reply.status)

        assert asyncio.run(check()) == health_pb2.HealthCheckResponse.SERVING
        slots = 'kvstore_node_free_bytes{where="slots"}'
        # What is free is counted from time to time.
        until_so(lambda: float(_samples(shared)[slots]) < ARENA)
        samples = _samples(shared)
        hits = 'kvstore_node_hit_blocks_total{domain="default",tier="dram"}'
        assert float(samples[hits]) >= 3
        missed = 'kvstore_node_missed_blocks_total{domain="default",reason="absent"}'
        assert float(samples[missed]) >= 3
        assert float(samples['kvstore_node_info{node="node-test"}']) == 1
        free = [float(samples[f'kvstore_node_free_bytes{{where="{w}"}}']) for w in (
            "extents", "slots")]  # fmt: skip
        assert 0 < free[0] < ARENA and 0 < free[1] < ARENA
        assert 0 <= float(samples["kvstore_node_fragmentation_ratio"]) < 1
        assert float(samples['kvstore_tier_capacity_bytes{tier="dram"}']) == ARENA
        assert float(samples['kvstore_node_rpc_seconds_count{method="Acquire"}']) >= 2


def _samples(node: RunningNode) -> dict[str, str]:
    with urllib.request.urlopen(f"http://{node.metrics}/metrics", timeout=PATIENCE_S) as page:
        lines = page.read().decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_two_keepers_cannot_share_a_directory(shared: RunningNode) -> None:
    ended = _run_node(shared.run_dir)
    assert ended.returncode == 1
    assert b"another keeper runs" in ended.stderr
    with connect(shared.run_dir, "still there") as client:
        assert client.stats().incarnation == 1


def _run_node(run_dir: Path, *options: str) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "kvstore.cli.main", "node", "--run-dir", str(run_dir)]
    return subprocess.run(
        [*command, "--arena-bytes", "1MiB", *options],
        capture_output=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


def test_a_port_that_is_taken_is_named_and_nothing_runs_on(run_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = _run_node(run_dir, "--listen", address)
    assert ended.returncode == 1
    assert address.encode() in ended.stderr
    assert sorted(p.name for p in run_dir.iterdir()) == ["cluster.key", "keeper.lock"]


def test_wrong_usage_names_the_flag(tmp_path: Path) -> None:
    ended = _run_node(tmp_path / ("d" * 120))
    assert (ended.returncode, b"--run-dir" in ended.stderr) == (2, True)
    ended = _run_node(tmp_path, "--arena-bytes", "many")
    assert (ended.returncode, b"--arena-bytes" in ended.stderr) == (2, True)


def test_nobody_else_gets_in(shared: RunningNode) -> None:
    assert (shared.run_dir.stat().st_mode & 0o777) == 0o700
    assert ((shared.run_dir / "keeper.sock").stat().st_mode & 0o777) == 0o600
    assert ((shared.run_dir / "cluster.key").stat().st_mode & 0o777) == 0o600
    path = str(shared.run_dir / "keeper.sock")
    with pytest.raises(Refused, match="a process of the session"):
        connect_session(path, Hello("x", (1 << 22,)), deadline_ms=PATIENCE_MS)


def test_another_user_is_refused(shared: RunningNode) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    script = (
        "import os, sys\n"
        "from kvstore.transport.session_socket import Hello, connect_session\n"
        "from kvstore.core.errors import Refused\n"
        "import socket\n"
        "os.chdir(sys.argv[1])\n"
        "os.setuid(12345)\n"
        "try:\n"
        "    connect_session('keeper.sock', Hello('x', (os.getpid(),)), deadline_ms=5000)\n"
        "except Refused as error:\n"
        "    sys.exit(3)\n"
    )
    # Opened up on purpose: the socket must not rely on the directory's mode alone.
    shared.run_dir.chmod(0o755)
    (shared.run_dir / "keeper.sock").chmod(0o666)
    try:
        ended = subprocess.run(
            [sys.executable, "-c", script, str(shared.run_dir)], timeout=PATIENCE_S, check=False
        )
    finally:
        (shared.run_dir / "keeper.sock").chmod(0o600)
        shared.run_dir.chmod(0o700)
    assert ended.returncode == 3


def test_sessions_are_bounded() -> None:
    with start_node(arena_bytes=ARENA, options=["--max-sessions", "2"]) as node:
        path = str(node.run_dir / "keeper.sock")
        hello = Hello("x", (os.getpid(),))
        held = [connect_session(path, hello, deadline_ms=PATIENCE_MS) for _ in range(2)]
        with pytest.raises(Refused) as refused:
            connect_session(path, hello, deadline_ms=PATIENCE_MS)
        assert refused.value.retry_after_ms > 0
        for _, fd, sock in held:
            os.close(fd)
            sock.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_and_leaves_nothing(number: signal.Signals, run_dir: Path) -> None:
    with start_node(run_dir, arena_bytes=ARENA) as node:
        node_pid, keeper_pid = node.node_pid, node.keeper_pid
        os.kill(keeper_pid, number)
        assert node._process.wait(PATIENCE_S) == 0
        assert not Path(f"/proc/{node_pid}").exists()
        left = {path.name for path in run_dir.iterdir()}
        assert left == {"cluster.key", "keeper.lock", "keeper.log"}


def test_keeper_and_node_end_with_their_parent(run_dir: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    options = ["--parent-pid", str(parent.pid)]
    with start_node(run_dir, arena_bytes=ARENA, options=options) as node:
        node_pid = node.node_pid
        parent.kill()
        parent.communicate(timeout=PATIENCE_S)
        assert node._process.wait(PATIENCE_S) == 0
        assert not Path(f"/proc/{node_pid}").exists()


def test_a_killed_keeper_takes_its_node_along_and_can_be_started_again(run_dir: Path) -> None:
    with start_node(run_dir, arena_bytes=ARENA) as node:
        node.kill_keeper()
    assert (run_dir / "keeper.sock").exists()
    with start_node(run_dir, arena_bytes=ARENA), connect(run_dir, "again") as client:
        assert client.get(names_of(client, 1, 1)) == []


def test_the_description_is_what_the_command_printed(shared: RunningNode) -> None:
    described = json.loads((shared.run_dir / "node.json").read_text())
    assert set(described) == {
        "name", "pid", "node_pid", "keeper_socket", "rpc", "listen", "bulk", "metrics",
        "incarnation",
    }  # fmt: skip
    assert described["pid"] == shared.keeper_pid
