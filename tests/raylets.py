"""A Ray cluster of several raylets on this machine, as a process that a test may order about.

Run as `python -m tests.raylets COUNT`: prints one line of JSON when it is up, then
does what each line on its standard input says (`add`, `kill N` for raylet N, `gcs-down` and
`gcs-up` for the head's control store) and answers with `done`. It ends everything
when its input ends. Everything is on loopback.
"""

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from tests.patience import PATIENCE_S
from tests.processes import REPOSITORY

STORE_BYTES: Final = 80 << 20


@dataclass
class Raylets:
    """The cluster as its test sees it."""

    process: "subprocess.Popen[str]"
    address: str
    environment: dict[str, str] = field(repr=False)
    """What every process that joins has to have."""

    def order(self, words: str) -> None:
        """Have one thing done; returns when it is."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n", words


@contextmanager
def raylets(count: int, *, mark: dict[str, str], redis: str = "") -> Iterator[Raylets]:
    """Run a head and `count - 1` further raylets; `redis` is where the head keeps its state."""
    folder = tempfile.mkdtemp(prefix="kv", dir="/tmp")  # Ray's sockets have long names
    paths = [str(REPOSITORY / part) for part in ("", "workers", "kernels")]
    before = os.environ.get("PYTHONPATH", "")
    environment = os.environ | mark | {
        "PYTHONPATH": os.pathsep.join([before, *paths] if before else paths),
        # Despite the name it means "a cluster may span machines": 0 binds 127.0.0.1.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_TMPDIR": folder,
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    if redis:
        environment["RAY_REDIS_ADDRESS"] = redis
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.raylets", str(count)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        cwd=REPOSITORY,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdin is not None
        facts = json.loads(process.stdout.readline())
        yield Raylets(process, facts["address"], environment)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait(PATIENCE_S)
        if process.stdout is not None:
            process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Run the raylets until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    count = parser.parse_args().count
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints to standard output
    from ray.cluster_utils import Cluster

    common: dict[str, Any] = {"num_cpus": 4, "num_gpus": 0, "object_store_memory": STORE_BYTES}
    cluster = Cluster(
        initialize_head=True, shutdown_at_exit=False,
        head_node_args={**common, "include_dashboard": False},
    )  # fmt: skip
    head = cluster.head_node
    assert head is not None
    nodes = [head]
    nodes += [cluster.add_node(**common) for _ in range(count - 1)]
    out.write(json.dumps({"address": cluster.address}) + "\n")
    out.flush()
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "add":
            nodes.append(cluster.add_node(**common))
        elif word == "gcs-down":
            head.kill_gcs_server()
        elif word == "gcs-up":
            head.start_gcs_server()
        elif word == "kill":
            cluster.remove_node(nodes[int(number)], allow_graceful=False)
        out.write("done\n")
        out.flush()
    cluster.shutdown()


if __name__ == "__main__":
    main()
