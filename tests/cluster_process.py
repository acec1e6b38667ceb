"""A real cluster for tests, by the very commands that users type; and a count of its processes.

What only exists as processes of such a cluster is reached from here: `kvworkers.cluster.session`
starts what `kvworkers.cluster.launch` says through `kvworkers.cluster.ray_runtime`,
`kvworkers.cluster.progress` shows it, `kvworkers.cluster.controller` restarts the
`kvworkers.cluster.parts` that tests kill, and `kvworkers.demo.session` is the demonstration.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.patience import PATIENCE_S

MARK: Final = "KVSTORE_TEST_MARK"
"""An environment variable that every process of a cluster inherits, however it detaches."""

_LISTENING: Final = "0A"
"""The state of a listening socket in /proc/net/tcp."""

UP_SECONDS: Final = 280.0
DOWN_SECONDS: Final = 120.0
KVSTORE: Final = (sys.executable, "-m", "kvstore.cli.main")


def marked_processes(mark: str) -> list[int]:
    """Return the living processes that carry `mark`, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                environment = (entry / "environ").read_bytes()
                if f"{MARK}={mark}".encode() in environment.split(b"\0"):
                    found.append(int(entry.name))
    return sorted(found)


def command_line(pid: int) -> str:
    """Return what a process calls itself."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def listening_addresses(pids: Iterable[int]) -> set[tuple[str, int]]:
    """Return (host, port) of every TCP socket that these processes listen on."""
    inodes = set()
    for pid in pids:
        with suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and fields[9] in inodes:
                host, _, port = fields[1].rpartition(":")
                words = [bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8)]
                written = socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:")
                found.add((written, int(port, 16)))
    return found


def eventually(check: Callable[[], Any], *, what: str, seconds: float = PATIENCE_S) -> Any:
    """Return the first true answer of `check`; fail when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := check():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what}")


@dataclass(frozen=True)
class ClusterProcess:
    """A cluster that `kvstore up --detach` has started."""

    name: str
    http: str
    grpc: str
    model: str
    pid: int
    run_dir: Path
    log: str
    parts: list[dict[str, Any]]
    mark: str = field(default="")

    def address(self, part: str) -> str:
        """Return the gRPC address of a part at the time when the cluster came up."""
        return next(str(p["address"]) for p in self.parts if p["name"] == part)

    def first_pid(self, part: str) -> int:
        """Return the process of a part at the time when the cluster came up."""
        return next(int(p["pid"]) for p in self.parts if p["name"] == part)

    def pids(self, words: str) -> list[int]:
        """Return the processes of this cluster whose command line contains `words`."""
        return [pid for pid in marked_processes(self.mark) if words in command_line(pid)]


@contextmanager
def cluster_process(*options: str) -> Iterator[ClusterProcess]:
    """Start a cluster, and end it by `kvstore down`, which has to leave no process behind."""
    mark = secrets.token_hex(8)
    name = f"test-{mark[:8]}"
    environment = os.environ | {MARK: mark}
    up = [*KVSTORE, "up", "--detach", "--json", "--name", name, "--http", "127.0.0.1:0", *options]
    facts: dict[str, Any] = {}
    try:
        started = subprocess.run(
            up, env=environment, capture_output=True, text=True, timeout=UP_SECONDS, check=False
        )
        assert started.returncode == 0, started.stderr
        facts = json.loads(started.stdout)
        facts["run_dir"] = Path(facts["run_dir"])
        yield ClusterProcess(**facts, mark=mark)
    finally:
        ended = subprocess.run(
            [*KVSTORE, "down", "--name", name],
            capture_output=True,
            text=True,
            timeout=DOWN_SECONDS,
            check=False,
        )
        if ended.returncode == 0 and facts:
            Path(facts["log"]).unlink()
        left = {pid: command_line(pid) for pid in marked_processes(mark)}
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert ended.returncode == 0, ended.stderr
    assert not left, f"processes left behind: {left}"
    assert not facts["run_dir"].exists()
