"""vLLM's tiering manager, its own code, over `kvstore.adapters.vllm.tier` and a real node.

Skipped unless KVSTORE_VLLM_PYTHON names an environment with vLLM. Each role is a process, so what
is loaded was stored by another engine. What moves chunks between GPU and CPU is not run here.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.testing.node import RunningNode, new_run_dir, start_node

PYTHON = os.environ.get("KVSTORE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="KVSTORE_VLLM_PYTHON names no environment with vLLM"),
    pytest.mark.timeout(900),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    node = start_node(new_run_dir(), arena_bytes=64 << 20, options=[])
    yield node
    node.stop()


def run(role: str, node: RunningNode, **more: Any) -> dict[str, Any]:
    tier = {
        "type": "KvStoreTier", "module_path": "kvstore.adapters.vllm.tier",
        "run_dir": str(node.run_dir), "weights_digest": "11" * 32, **more,
    }  # fmt: skip
    script = str(Path(__file__).with_name("tier_process.py"))
    ran = subprocess.run(
        [PYTHON, script, role, json.dumps(tier)], stdout=subprocess.PIPE, check=True, timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT), "VLLM_NO_USAGE_STATS": "1"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_chunks_of_one_engine_come_back_in_another(node: RunningNode) -> None:
    assert run("miss", node)["verdicts"] == ["MISS"] * 8
    assert run("store", node)["stored"] == 8
    found = run("load", node)
    assert found["first"] == "RETRY"  # the scheduler never waits for the node
    assert found["whole"] == [True] * 8
    sys.stdout.write(f"\n8 chunks promoted in {found['seconds'] * 1e3:.0f} ms\n")
    assert run("miss", node, weights_digest="22" * 32)["verdicts"] == ["MISS"] * 8


def test_vllm_publishes_what_the_node_holds_and_what_no_longer(node: RunningNode) -> None:
    found = run("events", node, weights_digest="33" * 32)
    assert (found["removed_before"], found["same"]) == (0, True)
    assert found["places"] == [["CPU", "LOCAL", "KvStoreTier"]]


def test_a_node_that_is_dead_costs_no_step_anything(node: RunningNode) -> None:
    run_dir = new_run_dir()  # nobody is there
    found = run("miss", node, run_dir=str(run_dir))
    assert found["verdicts"] == ["MISS"] * 8
    assert found["slowest_ms"] < 50
