"""A real vLLM that loads layer by layer in the step that computes, and publishes what the node has.

Skipped unless KVSTORE_VLLM_PYTHON names an environment with vLLM. Through it run the modules
`kvstore.adapters.vllm.connector`, `kvstore.adapters.vllm.layer_loads`,
`kvstore.adapters.vllm.block_events` and `kvstore.adapters.vllm.engine_events`.
"""

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest
import zmq
from kvworkers.models.provision import ensure_model

from kvstore import Client, Namespace
from kvstore.testing.node import RunningNode, new_run_dir, start_node
from tests.engines.vllm_engine import Engine

PYTHON = os.environ.get("KVSTORE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="KVSTORE_VLLM_PYTHON names no environment with vLLM"),
    pytest.mark.timeout(900),
]
DICE = random.Random(9)
PROMPTS = [[DICE.randrange(1000, 40000) for _ in range(440)] for _ in range(6)]
"""More than the arena holds; of each, 416 tokens are whole blocks before the last token."""
NEW = [DICE.randrange(1000, 40000) for _ in range(70)]
LAYERWISE = {"layerwise": True, "load_ms": 1}
"""What lies on disk is not waited for: such a load fails in the middle of its step."""


class Setup(NamedTuple):
    node: RunningNode
    engine: Engine
    expected: list[list[int]]
    events: Any


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """An engine that starts with nothing, after another has computed and stored every prompt."""
    logs, model = tmp_path_factory.mktemp("engines"), ensure_model()
    node = start_node(
        new_run_dir(), arena_bytes=64 << 20,
        options=["--nvme", str(tmp_path_factory.mktemp("nvme")), "--nvme-bytes", "512MiB"],
    )  # fmt: skip
    arguments: dict[str, Any] = {"async_scheduling": False}
    first = Engine(
        PYTHON, model, logs / "first", node.run_dir, settings=LAYERWISE, arguments=arguments
    )
    try:
        replies = first.replies(PROMPTS)  # the node is empty: vLLM's own answers
        assert not any(reply["cached"] for reply in replies)
    finally:
        first.close()
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as folder:  # sockets' names are short
        endpoint = f"ipc://{folder}/events"
        arguments["kv_events_config"] = {
            "enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint,
        }  # fmt: skip
        context: Any = zmq.Context()
        subscriber = context.socket(zmq.SUB)
        subscriber.subscribe(b"")
        engine = Engine(
            PYTHON, model, logs / "second", node.run_dir, settings=LAYERWISE, arguments=arguments
        )
        subscriber.connect(endpoint)
        yield Setup(node, engine, [reply["tokens"] for reply in replies], subscriber)
        engine.close()
        context.destroy(0)
    node.stop()


def counted(engine: Engine, name: str) -> float:
    found: dict[str, float] = engine.ask(metrics=True)["metrics"]
    return found.get(f"kvstore_vllm_{name}_total", 0.0)


def test_what_is_in_memory_is_loaded_in_the_step_and_the_answers_are_the_same(
    there: Setup,
) -> None:
    reply = there.engine.replies(PROMPTS[-1:])[0]
    assert reply["cached"] == 416
    assert reply["tokens"] == there.expected[-1]
    assert counted(there.engine, "loaded_tokens") == 416
    assert counted(there.engine, "load_failures") == 0


def test_loads_that_fail_in_the_middle_of_their_step_are_computed_anew(there: Setup) -> None:
    for together in (True, False):
        there.engine.forget()
        replies = there.engine.replies(PROMPTS, together=together)
        assert [reply["tokens"] for reply in replies] == there.expected
    assert counted(there.engine, "load_failures") > 0, "every load was whole: nothing was shown"
    assert counted(there.engine, "unexpected") == 0


def test_a_node_that_hangs_or_is_killed_under_them(there: Setup) -> None:
    for pause_s in (0.0, 0.05):
        there.engine.forget()
        incarnation = there.node.incarnation
        killer = threading.Timer(pause_s, there.node.kill_node)
        killer.start()
        replies = there.engine.replies(PROMPTS, together=True)
        assert [reply["tokens"] for reply in replies] == there.expected
        killer.join()
        there.node.wait_restarted(incarnation)
    there.engine.forget()
    there.node.signal_node(signal.SIGSTOP)
    try:
        replies = there.engine.replies(PROMPTS[-2:])
    finally:
        there.node.signal_node(signal.SIGCONT)
    assert [reply["tokens"] for reply in replies] == there.expected[-2:]
    time.sleep(1.5)  # the circuit closes again
    for _ in range(2):
        there.engine.forget()
        replies = there.engine.replies(PROMPTS[-1:])
    assert replies[0]["tokens"] == there.expected[-1]
    assert replies[0]["cached"] > 0, "the restarted node is used, without a restart of vLLM"


def test_blocks_are_published_when_the_node_has_them_and_when_it_has_not(there: Setup) -> None:
    drain(there)
    there.engine.replies([NEW])
    own, ours = stored_hashes(there, 2)
    assert ours == own[:2], "under vLLM's own hashes, parents and tokens with them"
    any_model = Namespace(weights_digest="o", kv_dtype="float32", layers=1, kv_heads=1, head_dim=64)
    where = there.node.run_dir
    with Client.connect(where, namespace=any_model, payload_bytes=8192, shares=1) as client:
        client.clear(everything=True)
    gone: set[Any] = set()
    ends = time.monotonic() + 60
    while not {block for block, *_ in ours} <= gone:
        assert time.monotonic() < ends, "no removals were published"
        there.engine.replies([NEW[:5]], 1)  # vLLM takes events after a step
        for event in drain(there):
            if event["type"] == "BlockRemoved" and event.get("ownership") == "kvstore":
                gone.update(event["block_hashes"])


def stored_hashes(there: Setup, count: int) -> tuple[list[Any], list[Any]]:
    """Return (hash, parent, tokens) of the blocks published by vLLM's cache, and by us."""
    own: list[Any] = []
    ours: list[Any] = []
    ends = time.monotonic() + 60
    while len(ours) < count:
        assert time.monotonic() < ends, "nothing was published"
        there.engine.replies([NEW[:5]], 1)
        for event in drain(there):
            if event["type"] != "BlockStored":
                continue
            for at, block in enumerate(event["block_hashes"]):
                parent = event["block_hashes"][at - 1] if at else event["parent_block_hash"]
                size = event["block_size"]
                told = (block, parent, event["token_ids"][at * size : at * size + size])
                (ours if event.get("ownership") == "kvstore" else own).append(told)
    assert all(len(tokens) == 32 for _, _, tokens in ours)
    return own, sorted(ours, key=lambda told: told[1] is not None)


def drain(there: Setup) -> list[dict[str, Any]]:
    """Return the events that have arrived."""
    events: list[dict[str, Any]] = []
    while there.events.poll(200):
        _, _, payload = there.events.recv_multipart()
        events += msgspec.msgpack.decode(payload)[1]
    return events
