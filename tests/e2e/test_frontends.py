"""Frontends over a real node and real workers: real text, real hits, a real death."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from kvworkers.frontends.server import FrontendConfig, FrontendServer, serving

from kvstore.router.members import Member
from kvstore.testing.node import RunningNode, start_node
from tests.model_fixture import model_dir as model_dir
from tests.processes import Started, started

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

SYSTEM = (
    "You are the assistant of a small museum of navigation in Lisbon. Answer in one short"
    " sentence. The museum opens at ten in the morning and closes at six in the evening; on"
    " Mondays it stays closed. It keeps astrolabes, quadrants, sea charts and the log books of"
    " several expeditions. Tickets cost six euros, and children under twelve enter free."
)
QUESTION = "When does the museum open, and what does a ticket cost?"


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=256 << 20) as node:
        yield node


@pytest.fixture(scope="module")
def workers(node: RunningNode, model_dir: Path) -> Iterator[list[Started]]:
    with ExitStack() as stack:
        yield [stack.enter_context(start_worker(node, model_dir, f"w{at}")) for at in range(2)]


def start_worker(node: RunningNode, model: Path, name: str) -> AbstractContextManager[Started]:
    return started(
        ["-m", "kvworkers.worker", "--json", "--threads", "1", "--pool-bytes", str(128 << 20),
         "--model", str(model), "--node", str(node.run_dir), "--name", name]
    )  # fmt: skip


@pytest.fixture
async def frontend(
    node: RunningNode, workers: list[Started], model_dir: Path
) -> AsyncIterator[FrontendServer]:
    async with serving(FrontendConfig(model=model_dir)) as server:
        members = [
            Member("worker", worker.ready["worker"], worker.ready["address"]) for worker in workers
        ]
        await server.set_members([*members, Member("node", node.name, node.listen)])
        async with asyncio.timeout(30):
            while not all(  # noqa: ASYNC110 - others change it
                server.worker_ready(member.name) for member in members
            ):
                await asyncio.sleep(0.05)
        yield server


def connect(frontend: FrontendServer) -> openai.AsyncOpenAI:
    url = f"http://{frontend.http_address}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0)


async def only_model(client: openai.AsyncOpenAI) -> str:
    (model,) = [one.id async for one in client.models.list()]
    return model


async def ask(
    client: openai.AsyncOpenAI, question: str, **fields: object
) -> tuple[str, dict[str, Any]]:
    model = await only_model(client)
    reply = await client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        temperature=0,
        max_tokens=24,
        extra_body=fields or None,
    )
    return str(reply.choices[0].message.content), (reply.model_extra or {})["kvstore"]


async def test_a_repeated_prompt_hits_and_says_the_same(frontend: FrontendServer) -> None:
    async with connect(frontend) as client:
        plain, account = await ask(client, QUESTION, kvstore={"no_read": True, "no_store": True})
        assert sum(account["cached_tokens"].values()) == 0 and plain
        cold, _ = await ask(client, QUESTION)
        hit, account = await ask(client, QUESTION)
        assert cold == hit == plain
        assert account["cached_tokens"]["hbm"] >= 96
        assert account["computed_tokens"] <= 32


async def test_a_lost_worker_costs_nothing_but_a_retry(
    frontend: FrontendServer, workers: list[Started]
) -> None:
    question = "Which instruments does the museum keep, and who wrote the log books?"
    async with connect(frontend) as client:
        plain, _ = await ask(client, question, kvstore={"no_read": True, "no_store": True})
        model = await only_model(client)
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
            temperature=0,
            max_tokens=24,
            stream=True,
        )
        text, pieces = "", 0
        account: dict[str, Any] = {}
        async for event in stream:
            text += event.choices[0].delta.content or ""
            account = (event.model_extra or {}).get("kvstore", account)
            pieces += 1
            if pieces == 5:
                busy = await running_worker(workers)
                busy.kill()
        assert text == plain
        assert account["retries"] == 1


async def running_worker(workers: list[Started]) -> Started:
    """Return the worker that has a request in its batch, by its own metrics."""
    async with httpx.AsyncClient(trust_env=False) as http:
        for worker in workers:
            page = (await http.get(f"http://{worker.ready['metrics']}/metrics")).text
            if "kvstore_worker_running 1.0" in page:
                return worker
    raise AssertionError("no worker runs anything")
