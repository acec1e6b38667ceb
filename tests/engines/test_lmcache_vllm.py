"""The whole way through LMCache: a real vLLM, LMCache's connector and server, our adapter, a node.

vLLM on CPU and LMCache's server run in environments of their own; LMCache's package lies beside
vLLM's, without its dependencies. Needs KVSTORE_VLLM_PYTHON, KVSTORE_LMCACHE_PYTHON and
KVSTORE_LMCACHE_BESIDE (`make test-engines`); skipped without.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from kvworkers.models.provision import ensure_model

from kvstore import Client, Namespace
from kvstore.directory.events import TierKind
from kvstore.testing.node import RunningNode, new_run_dir, start_node
from tests.engines.disk_damage import damage
from tests.engines.envoy_process import free_port
from tests.engines.vllm_engine import ROOT, Engine
from tests.patience import until_so

PYTHON, LMCACHE, BESIDE = (
    os.environ.get(f"KVSTORE_{name}", "")
    for name in ("VLLM_PYTHON", "LMCACHE_PYTHON", "LMCACHE_BESIDE")
)
pytestmark = [
    pytest.mark.skipif(not (PYTHON and LMCACHE and BESIDE), reason="no vLLM or no LMCache"),
    pytest.mark.timeout(900),
]
QUIET = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
DICE = random.Random(5)
PROMPTS = [[DICE.randrange(1000, 40000) for _ in range(300)] for _ in range(6)]
"""Of each, four chunks of 64 tokens are whole; all together are more than the arena holds."""
CACHED = 256


class Host:
    """A node over directories that outlive it."""

    def __init__(self, nvme: Path) -> None:
        self.nvme, self.run_dir = nvme, new_run_dir()
        self.start()

    def start(self) -> None:
        options = ["--nvme", str(self.nvme), "--nvme-bytes", "512MiB"]
        self.node: RunningNode = start_node(self.run_dir, arena_bytes=64 << 20, options=options)

    def tier(self, kind: TierKind) -> Any:
        other = Namespace(weights_digest="o", kv_dtype="float32", layers=1, kv_heads=1, head_dim=64)
        with Client.connect(self.run_dir, namespace=other, payload_bytes=8192, shares=1) as client:
            return client.stats().tiers[kind]


class Server:
    """LMCache's multiprocess server with our adapter as its second level."""

    def __init__(self, run_dir: Path, log: Path) -> None:
        self.port, http = free_port(), free_port()
        self._url = f"http://127.0.0.1:{http}"
        adapter = {
            "type": "plugin", "module_path": "kvstore.adapters.lmcache.adapter",
            "class_name": "KvStoreL2Adapter",
            "adapter_params": {"run_dir": str(run_dir), "weights_digest": "w",
                               "layout": "float32 chunk 64", "pause_ms": 200},
        }  # fmt: skip
        command = [
            str(Path(LMCACHE).with_name("lmcache")), "server", "--host", "127.0.0.1",
            "--port", str(self.port), "--http-host", "127.0.0.1", "--http-port", str(http),
            "--l1-size-gb", "1", "--eviction-policy", "LRU", "--chunk-size", "64",
            "--supported-transfer-mode", "engine_driven", "--l2-adapter", json.dumps(adapter),
        ]  # fmt: skip
        environment = os.environ | QUIET | {"PYTHONPATH": str(ROOT)}
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        until_so(self._serves, seconds=120)

    def _serves(self) -> bool:
        assert self._process.poll() is None, "LMCache's server ended"
        try:
            return httpx.get(f"{self._url}/healthcheck", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def forget(self) -> None:
        """Empty LMCache's own memory: what it knows next comes from the node."""
        answer = httpx.post(f"{self._url}/cache/clear", trust_env=False, timeout=60)
        assert answer.status_code == 200, answer.text

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)


class Pair(NamedTuple):
    engine: Engine
    server: Server

    def forget(self) -> None:
        self.engine.forget()
        self.server.forget()

    def close(self) -> None:
        self.engine.close()
        self.server.close()


def started(run_dir: Path, logs: Path, name: str) -> Pair:
    server = Server(run_dir, logs / f"{name}-server")
    connector = {
        "kv_connector": "LMCacheMPConnector", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": server.port,
            "lmcache.mp.mp_transfer_mode": "engine_driven", "lmcache.mp.mq_timeout": 30,
        },
    }  # fmt: skip
    engine = Engine(
        PYTHON, ensure_model(), logs / f"{name}-engine", None,
        more=QUIET | {"PYTHONPATH": f"{ROOT}{os.pathsep}{BESIDE}"},
        arguments={"kv_transfer_config": connector},
    )  # fmt: skip
    return Pair(engine, server)


class Setup(NamedTuple):
    host: Host
    pair: Pair
    expected: list[list[int]]
    alone_s: float

    def right(self, replies: list[Any]) -> bool:
        return [reply["tokens"] for reply in replies] == self.expected


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """A pair that starts with nothing, after another has computed and stored every prompt."""
    host, logs = Host(tmp_path_factory.mktemp("nvme")), tmp_path_factory.mktemp("logs")
    first = started(host.run_dir, logs, "first")
    try:
        first.engine.replies([[7] * 100], 1)
        replies = first.engine.replies(PROMPTS)  # nothing is there: vLLM's own answers
        assert not any(reply["cached"] for reply in replies)
        alone_s = first.engine.replies([PROMPTS[0][::-1]], 1)[0]["s"]
        until_so(lambda: _written(host) >= 4 * len(PROMPTS), seconds=60)
    finally:
        first.close()
    pair = started(host.run_dir, logs, "second")
    try:
        yield Setup(host, pair, [reply["tokens"] for reply in replies], alone_s)
    finally:
        pair.close()
        host.node.stop()


def _written(host: Host) -> int:
    return int(host.tier(TierKind.NVME).blocks)


def test_a_second_engine_behind_a_new_server_answers_out_of_the_node(there: Setup) -> None:
    first_token = there.pair.engine.replies(PROMPTS[-1:], 1)[0]
    assert first_token["cached"] == CACHED
    there.pair.forget()
    replies = there.pair.engine.replies(PROMPTS)
    assert there.right(replies)
    assert sum(reply["cached"] for reply in replies) > 0
    sys.stderr.write(
        f"\nTTFT through LMCache: 300 tokens computed {there.alone_s:.3f} s, 256 of them from the "
        f"node {first_token['s']:.3f} s\n"
    )


def test_a_node_that_is_killed_under_loads_and_comes_back(there: Setup) -> None:
    for pause_s in (0.0, 0.05, 0.2):
        there.pair.forget()
        incarnation = there.host.node.incarnation
        killer = threading.Timer(pause_s, there.host.node.kill_node)
        killer.start()
        assert there.right(there.pair.engine.replies(PROMPTS, together=True))
        killer.join()
        there.host.node.wait_restarted(incarnation)
    _used_again(there)


def test_a_node_that_hangs(there: Setup) -> None:
    there.pair.forget()
    there.host.node.signal_node(signal.SIGSTOP)
    try:
        replies = there.pair.engine.replies(PROMPTS)
    finally:
        there.host.node.signal_node(signal.SIGCONT)
    assert there.right(replies)
    assert replies[0]["cached"] == 0
    _used_again(there)


def test_a_new_node_over_a_damaged_disk(there: Setup) -> None:
    """Keeper and node are new; vLLM and LMCache's server are not."""
    there.host.node.stop()
    assert damage(there.host.nvme) > 0, "nothing was stored on disk"
    there.host.start()
    ends = time.monotonic() + 60
    while int(there.host.tier(TierKind.NVME).corrupt) == 0:
        assert time.monotonic() < ends, "no damaged chunk was met"
        there.pair.forget()
        assert there.right(there.pair.engine.replies(PROMPTS))
    _used_again(there)


def _used_again(there: Setup) -> None:
    """See that the node is used again, by the same engine and the same server."""
    ends = time.monotonic() + 120
    cached = 0
    while not cached:
        assert time.monotonic() < ends, "the node is not used again"
        there.pair.forget()
        replies = there.pair.engine.replies(PROMPTS)
        assert there.right(replies)
        cached = sum(reply["cached"] for reply in replies)
