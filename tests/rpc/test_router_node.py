"""A router beside a real cache node: what it does to the view to kill the node and to clear it."""

import asyncio
import os

from prometheus_client import CollectorRegistry

from kvstore.client import Client
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import BlockName
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.members import Member, Members
from kvstore.router.placement import Prompt
from kvstore.router.router import Router, RouterConfig
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_S
from tests.scripted_worker import ScriptedWorker
from tests.session_process import PAYLOAD, connect, names_of

BLOCKS = 20


def members(node: RunningNode, worker: ScriptedWorker) -> Members:
    return Members.of(
        [
            Member("worker", worker.name, worker.address, "host-a"),
            Member("node", node.name, node.listen, "host-a"),
        ]
    )


async def until_hit(router: Router, prompt: Prompt, tokens: int) -> None:
    """Wait until a decision expects so many cached tokens."""
    async with asyncio.timeout(PATIENCE_S):
        await router.route(prompt)  # waits until the worker is known
        while router.explain(prompt).hit_tokens != tokens:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def follow(node: RunningNode, client: Client, names: list[BlockName]) -> None:
    prompt = Prompt(client.root, names, BLOCKS * BLOCK_TOKENS + 1, keeps=False)
    config = RouterConfig(resync_pause_ms=20)
    worker = ScriptedWorker("w")
    await worker.start()
    try:
        async with Router(metrics=RouterMetrics(CollectorRegistry()), config=config) as router:
            router.set_members(members(node, worker))
            await until_hit(router, prompt, BLOCKS * BLOCK_TOKENS)
            assert await asyncio.to_thread(node.wait_restarted, node.kill_node()) == 2
            await asyncio.to_thread(client.put, names_of(client, 2, 1), [os.urandom(PAYLOAD)])
            # The new incarnation is heard, the old one swept out.
            async with asyncio.timeout(PATIENCE_S):
                while router.view_blocks != BLOCKS + 1:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.01)
            await until_hit(router, prompt, BLOCKS * BLOCK_TOKENS)
            assert await asyncio.to_thread(client.clear) == BLOCKS + 1
            await until_hit(router, prompt, 0)
    finally:
        await worker.stop()


def test_what_was_there_before_is_found_outlives_a_killed_node_and_goes_when_cleared() -> None:
    with start_node(arena_bytes=16 << 20) as node, connect(node.run_dir, "router") as client:
        names = names_of(client, 1, BLOCKS)
        client.put(names, [os.urandom(PAYLOAD) for _ in names])
        asyncio.run(follow(node, client, names))
