"""A real vLLM on CPU uses a real node by configuration alone, and outlives whatever happens to it.

Skipped unless KVSTORE_VLLM_PYTHON names the interpreter of an environment with vLLM: `make
test-engines` makes one. Through it run the modules `kvstore.adapters.vllm.connector`,
`kvstore.adapters.vllm.stats` and `kvstore.adapters.vllm.engine_pages`.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kvworkers.models.provision import ensure_model

from kvstore import Client, Namespace
from kvstore.directory.events import TierKind
from kvstore.testing.node import RunningNode
from tests.engines.disk_damage import damage
from tests.engines.host import Host
from tests.engines.vllm_engine import Engine

PYTHON = os.environ.get("KVSTORE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="KVSTORE_VLLM_PYTHON names no environment with vLLM"),
    pytest.mark.timeout(900),
]
ARENA_BYTES = 64 << 20
"""Holds about 90 blocks of this model: less than all prompts here together."""
DICE = random.Random(7)
WARM, PREFIX, *OTHERS = ([DICE.randrange(1000, 40000) for _ in range(512)] for _ in range(8))
SHARED = [PREFIX + [DICE.randrange(1000, 40000) for _ in range(40)] for _ in range(3)]
PROMPTS = SHARED + OTHERS


def tokens(replies: list[Any]) -> list[list[int]]:
    return [reply["tokens"] for reply in replies]


@pytest.fixture(scope="module")
def model() -> Path:
    return ensure_model()


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM alone answers, and how long its first token takes."""
    engine = Engine(PYTHON, model, tmp_path_factory.mktemp("alone") / "log")
    try:
        engine.replies([WARM], 1)
        ttft = engine.replies([SHARED[0]], 1)[0]["s"]
        return {"tokens": tokens(engine.replies(PROMPTS)), "ttft_s": ttft}
    finally:
        engine.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("nvme"), arena_bytes=ARENA_BYTES, nvme_bytes="512MiB")
    yield host
    host.node.stop()


@pytest.fixture(scope="module")
def second(
    model: Path, host: Host, alone: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """An engine that starts with nothing, after another has computed every prompt."""
    logs = tmp_path_factory.mktemp("engines")
    first = Engine(PYTHON, model, logs / "first", host.run_dir)
    try:
        assert tokens(first.replies(PROMPTS[3:])) == alone["tokens"][3:]
        assert tokens(first.replies(SHARED)) == alone["tokens"][:3]
    finally:
        first.close()
    engine = Engine(PYTHON, model, logs / "second", host.run_dir)
    yield engine
    engine.close()


def test_a_second_engine_answers_out_of_the_node(second: Engine, alone: dict[str, Any]) -> None:
    second.replies([WARM], 1)
    first_token = second.replies([SHARED[0]], 1)[0]
    assert first_token["cached"] == 544
    replies = second.replies(SHARED)
    assert tokens(replies) == alone["tokens"][:3]
    sys.stderr.write(
        f"\nTTFT: vLLM alone {alone['ttft_s']:.3f} s, 544 of 552 tokens from the node "
        f"{first_token['s']:.3f} s: {alone['ttft_s'] / first_token['s']:.1f} times sooner\n"
    )


def test_more_than_the_arena_holds(second: Engine, alone: dict[str, Any]) -> None:
    second.forget()
    replies = second.replies(PROMPTS, together=True)
    assert tokens(replies) == alone["tokens"]


def test_a_node_that_hangs(second: Engine, host: Host, alone: dict[str, Any]) -> None:
    second.forget()
    host.node.signal_node(signal.SIGSTOP)
    try:
        replies = second.replies(SHARED)
    finally:
        host.node.signal_node(signal.SIGCONT)
    assert tokens(replies) == alone["tokens"][:3]
    assert replies[0]["cached"] == 0


def test_a_node_that_is_killed_under_loads_and_comes_back(
    second: Engine, host: Host, alone: dict[str, Any]
) -> None:
    for pause_s in (0.0, 0.02, 0.1):
        second.forget()
        killer = threading.Timer(pause_s, host.node.kill_node)
        incarnation = host.node.incarnation
        killer.start()
        assert tokens(second.replies(PROMPTS, together=True)) == alone["tokens"]
        killer.join()
        host.node.wait_restarted(incarnation)
    second.forget()
    time.sleep(1.5)  # the circuit closes again
    second.replies(SHARED)
    second.forget()
    again = second.replies(SHARED)
    assert tokens(again) == alone["tokens"][:3]
    assert again[0]["cached"] > 0, "the restarted node is used, without a restart of vLLM"


def test_blocks_that_were_corrupted_on_disk(
    second: Engine, host: Host, alone: dict[str, Any]
) -> None:
    host.node.stop()
    assert damage(Path(host._options[1])) > 0, "nothing was stored on disk"
    host.start()
    second.forget()
    time.sleep(3.0)  # the sessions come back
    assert tokens(second.replies(PROMPTS)) == alone["tokens"]
    assert corrupt_blocks(host.node) > 0, "no damaged block was met"
    shown = second.ask(metrics=True)["metrics"]
    sys.stderr.write(
        f"\n{ {n: v for n, v in shown.items() if 'kvstore' in n or 'external' in n} }\n"
    )


def corrupt_blocks(node: RunningNode) -> int:
    """Return how many blocks of its disk the node found damaged since it started."""
    any_model = Namespace(weights_digest="w", kv_dtype="float32", layers=1, kv_heads=1, head_dim=64)
    with Client.connect(node.run_dir, namespace=any_model, payload_bytes=8192, shares=1) as client:
        return client.stats().tiers[TierKind.NVME].corrupt
