"""Everything that can die, stop or rot does, under load, and nobody ever reads a wrong byte.

Three hosts with memory, disk, neighbours and shared files; two clients each, one that maps the
arena and one that does not. A tormentor kills and stops nodes and keepers, kills clients, and flips
bytes on disk. The oracle is in the clients: what belongs to a name follows from the name.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from kvstore.client import Client
from kvstore.core.errors import KvStoreError
from kvstore.testing.node import RunningNode, start_node
from tests.load_process import DEADLINE_MS
from tests.patience import PATIENCE_S
from tests.processes import REPOSITORY
from tests.session_process import PAYLOAD, connect

pytestmark = pytest.mark.slow
HOSTS = 3
TORMENTS = 30
GRACE_MS = 4 * DEADLINE_MS + 10_000
"""A turn is a get and a put, each of a few calls with deadlines; the machine is small and busy."""


class Host:
    """One host: its node in one life after another, and the clients on it."""

    def __init__(self, directory: Path, number: int, stack: ExitStack) -> None:
        self.directory = directory
        self.number = number
        self._stack = stack
        self.run_dir = directory / f"h{number}"
        self.disk = directory / f"disk{number}"
        self.node = self._start("127.0.0.1:0")
        self.clients: list[subprocess.Popen[str]] = []

    def _start(self, listen: str) -> RunningNode:
        options = (
            *("--listen", listen),
            *("--cluster-key-file", str(self.directory / "cluster.key"), "--policy", "lru"),
            *("--nvme", str(self.disk), "--nvme-bytes", "64MiB"),
            *("--files", str(self.directory / "shared"), "--files-bytes", "64MiB"),
            *("--peers", str(self.directory / "peers.json"), "--hang-ms", "3000"),
        )
        node = start_node(
            self.run_dir, arena_bytes=128 * PAYLOAD, name=f"node-{self.number}", options=options,
            deadline_s=60,
        )  # fmt: skip
        self._stack.callback(node.stop)
        return node

    def restart_keeper(self) -> None:
        listen = self.node.listen  # kept, so that remote clients find the next life
        self.node.kill_keeper()
        self.node = self._start(listen)

    def start_client(self, seed: int, *, remote: bool) -> None:
        where = self.node.listen if remote else str(self.run_dir)
        client = subprocess.Popen(
            [sys.executable, "-m", "tests.load_process", where, str(seed)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
        )  # fmt: skip
        self._stack.callback(_end, client)
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        self.clients.append(client)


class Cluster:
    def __init__(self, directory: Path, stack: ExitStack, seed: int) -> None:
        key = directory / "cluster.key"
        key.write_bytes(os.urandom(32))
        key.chmod(0o600)
        self.directory = directory
        self.dice = random.Random(seed)
        self.hosts = [Host(directory, number, stack) for number in range(HOSTS)]
        self.tell()
        self.done: Counter[str] = Counter()

    def tell(self) -> None:
        listed = [{"name": host.node.name, "address": host.node.listen} for host in self.hosts]
        fresh = self.directory / "peers.new"
        fresh.write_text(json.dumps({"peers": listed}))
        fresh.replace(self.directory / "peers.json")

    def torment(self) -> None:
        host = self.dice.choice(self.hosts)
        what = self.dice.choice(
            ["kill node", "stop node", "kill keeper", "kill client", "rot disk", "rot files"]
        )
        self.done[what] += 1
        with suppress(ProcessLookupError):  # it has just died of something else
            match what:
                case "kill node":
                    host.node.kill_node()
                case "stop node":
                    host.node.signal_node(signal.SIGSTOP)
                    time.sleep(self.dice.uniform(0.1, 1.5))
                    host.node.signal_node(signal.SIGCONT)
                case "kill keeper":
                    host.restart_keeper()
                    self.tell()
                case "kill client":
                    client = self.dice.choice(host.clients)
                    client.kill()
                    host.clients.remove(client)
                    host.start_client(self.dice.randrange(10_000), remote=self.dice.random() < 0.5)
                case _:
                    self._rot(host.disk if what == "rot disk" else self.directory / "shared")

    def _rot(self, directory: Path) -> None:
        """Flip some bytes of one file under a directory."""
        files = [path for path in directory.rglob("*") if path.suffix in (".data", ".block")]
        if not files:
            return
        path = self.dice.choice(files)
        with suppress(FileNotFoundError), path.open("r+b") as file:
            size = path.stat().st_size
            for _ in range(64):
                at = self.dice.randrange(size)
                file.seek(at)
                byte = file.read(1)
                if byte:
                    file.seek(at)
                    file.write(bytes([byte[0] ^ 0x10]))


def _end(client: "subprocess.Popen[str]") -> None:
    client.kill()
    client.wait(PATIENCE_S)
    for pipe in (client.stdin, client.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()


def _told(client: "subprocess.Popen[str]") -> dict[str, Any]:
    """End a client in good order and return what it counted."""
    assert client.stdin is not None and client.stdout is not None
    client.stdin.close()
    line = client.stdout.readline()
    assert line, "a client died of something else than us"
    told: dict[str, Any] = json.loads(line)
    return told


@pytest.fixture(params=[1, 2])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    short = Path("/tmp") / f"kv-{os.getpid()}-{request.param}"  # Unix socket paths are short
    short.symlink_to(tmp_path)
    with ExitStack() as stack:
        stack.callback(short.unlink)
        yield Cluster(short, stack, request.param)


def test_nobody_reads_a_wrong_byte_whatever_dies(cluster: Cluster) -> None:
    for host in cluster.hosts:
        host.start_client(host.number, remote=False)
        host.start_client(100 + host.number, remote=True)
    for _ in range(TORMENTS):
        time.sleep(cluster.dice.uniform(0.2, 1.2))
        cluster.torment()
    time.sleep(8)  # whatever was restarted last is up again, and nothing is done to anyone now
    counts: Counter[str] = Counter()
    for host in cluster.hosts:
        for client in host.clients:
            told = _told(client)
            assert told.pop("longest_ms") < GRACE_MS, "somebody was stuck"
            counts.update(told)
    sys.stderr.write(f"\n{dict(cluster.done)}\n{dict(counts)}\n")
    assert counts["wrong"] == 0
    assert counts["gets"] > 100
    assert counts["hit blocks"] > 500
    for host in cluster.hosts:
        _nothing_leaks(host)


def _nothing_leaks(host: Host) -> None:
    """After everybody has gone nobody holds anything, and the node takes and gives as ever."""
    with connect(host.run_dir, "after") as client:
        _wait(lambda: client.stats().leases == 0, client, "a lease leaked")
        _wait(lambda: client.stats().reserved_bytes == 0, client, "a reservation leaked")
        _wait(
            lambda: client.stats().slots.get("draining", 0) == 0, client, "a slot drains for ever"
        )
        _wait(lambda: client.stats().sessions == 1, client, "a session leaked")
    descriptors = len(os.listdir(f"/proc/{host.node.node_pid}/fd"))
    assert descriptors < 200, f"{descriptors} descriptors"


def _wait(true: Any, client: Client, what: str) -> None:
    ends = time.monotonic() + PATIENCE_S  # remote sessions and tickets end by time
    while True:
        with suppress(KvStoreError):
            if true():
                return
        assert time.monotonic() < ends, f"{what}: {client.stats()}"
        time.sleep(0.2)
