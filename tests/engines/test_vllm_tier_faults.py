"""vLLM's tiering manager over our tier while its node is killed, hangs, forgets and is damaged.

Skipped unless KVSTORE_VLLM_PYTHON names an environment with vLLM. One process with vLLM's own
manager lives through all of it; what it loads was pushed out of vLLM's CPU tier before.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.disk_damage import damage
from tests.engines.host import Host

PYTHON = os.environ.get("KVSTORE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="KVSTORE_VLLM_PYTHON names no environment with vLLM"),
    pytest.mark.timeout(900),
]
ROOT = Path(__file__).resolve().parents[2]
SETS = [list(range(first, first + 8)) for first in range(1, 1000, 8)]
"""Of eight chunks of 64 KiB each; vLLM's CPU tier holds two sets."""
ANSWER_S = 60.0


class Tier:
    """vLLM's manager in a process of its own."""

    def __init__(self, run_dir: Path) -> None:
        config = {
            "type": "KvStoreTier", "module_path": "kvstore.adapters.vllm.tier",
            "run_dir": str(run_dir), "weights_digest": "44" * 32, "pause_ms": 200,
        }  # fmt: skip
        script = str(Path(__file__).with_name("tier_process.py"))
        self._process = subprocess.Popen(
            [PYTHON, script, "serve", json.dumps(config)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "VLLM_NO_USAGE_STATS": "1"},
        )  # fmt: skip

    def ask(self, **order: list[int]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        if "here" in answer:
            assert answer["right"] == answer["here"], "a wrong byte was given"
        return answer

    def push_out(self) -> None:
        """Fill vLLM's CPU tier with others."""
        for others in SETS[-2:]:
            self.ask(store=others)

    def load(self, numbers: list[int]) -> int:
        """Return how many chunks came from the node."""
        found: int = self.ask(load=numbers)["here"]
        return found

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("nvme"), arena_bytes=8 << 20)
    yield host
    host.node.stop()


@pytest.fixture(scope="module")
def tier(host: Host) -> Iterator[Tier]:
    tier = Tier(host.run_dir)
    yield tier
    tier.close()


def comes_back(tier: Tier, numbers: list[int]) -> None:
    """See that the same manager finds chunks in the node again, stored anew if they were lost."""
    ends = time.monotonic() + ANSWER_S
    while tier.load(numbers) != len(numbers):
        assert time.monotonic() < ends, "the node is not used again"
        tier.ask(store=numbers)
        tier.push_out()


def test_chunks_pushed_out_of_the_engine_come_back_from_the_node(tier: Tier) -> None:
    assert tier.ask(store=SETS[0])["stored"] == 8
    tier.push_out()
    assert tier.load(SETS[0]) == 8
    assert tier.load(SETS[1]) == 0


def test_a_node_that_is_killed_under_loads_and_comes_back(host: Host, tier: Tier) -> None:
    tier.ask(store=SETS[2])
    for pause_s in (0.0, 0.003, 0.01):
        tier.push_out()
        incarnation = host.node.incarnation
        killer = threading.Timer(pause_s, host.node.kill_node)
        killer.start()
        tier.load(SETS[2])
        killer.join()
        host.node.wait_restarted(incarnation)
    comes_back(tier, SETS[2])


def test_a_node_that_hangs_keeps_no_scheduler_waiting(host: Host, tier: Tier) -> None:
    tier.ask(store=SETS[3])
    tier.push_out()
    host.node.signal_node(signal.SIGSTOP)
    try:
        answer = tier.ask(load=SETS[3])
        assert answer["here"] == 0
        tier.ask(store=SETS[4])  # its cascade ended without the node
    finally:
        host.node.signal_node(signal.SIGCONT)
    assert answer["slowest_ms"] < 250, "a lookup waited for the node's deadline"
    comes_back(tier, SETS[3])


def test_more_than_the_node_holds_is_forgotten_and_never_wrong(tier: Tier) -> None:
    wanted = SETS[:120]  # 60 MiB of chunks over an arena of 8
    for numbers in wanted:
        tier.ask(store=numbers)
    came = sum(tier.load(numbers) for numbers in wanted)
    assert 0 < came


def test_a_new_node_over_a_damaged_disk(host: Host, tier: Tier) -> None:
    """Keeper and node are new, vLLM's process is not, and what is on disk has lost bytes."""
    host.node.stop()
    assert tier.load(SETS[0]) == 0
    assert damage(host.nvme) > 0, "nothing was stored on disk"
    host.start()
    ends = time.monotonic() + ANSWER_S
    while host.corrupt_blocks() == 0:
        assert time.monotonic() < ends, "no damaged chunk was met"
        for numbers in SETS[:120]:
            tier.load(numbers)
    comes_back(tier, SETS[5])
