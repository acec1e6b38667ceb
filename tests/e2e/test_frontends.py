"""Frontends over a real node and real workers: real text, real hits, a real death."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from kvworkers.frontends.server import FrontendConfig, FrontendServer, serving

from kvstore.core.names import pack_tokens
from kvstore.router.members import Member
from kvstore.rpc.channel import open_channel
from kvstore.rpc.v1 import worker_pb2, worker_pb2_grpc
from kvstore.testing.node import RunningNode, start_node
from tests.model_fixture import model_dir as model_dir
from tests.patience import PATIENCE_S
from tests.processes import Started, started

pytestmark = pytest.mark.e2e

SYSTEM = (
    "You are the assistant of a small museum of navigation in Lisbon. Answer in one short"
    " sentence. The museum opens at ten in the morning and closes at six in the evening; on"
    " Mondays it stays closed. It keeps astrolabes, quadrants, sea charts and the log books of"
    " several expeditions. Tickets cost six euros, and children under twelve enter free."
)
OTHER = "Of quadrants. " + SYSTEM
QUESTION = "When does the museum open, and what does a ticket cost?"


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=256 << 20) as node:
        yield node


@pytest.fixture(scope="module")
def workers(node: RunningNode, model_dir: Path) -> Iterator[list[Started]]:
    with ExitStack() as stack:
        yield [stack.enter_context(start_worker(node, model_dir, f"w{at}")) for at in range(2)]


async def create(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    return await client.chat.completions.create(**fields)


async def counted(workers: list[Started], name: str, **labels: str) -> float:
    """Return a counter of all workers together."""
    said = ",".join(f'{key}="{value}"' for key, value in labels.items())
    sample, total = re.compile(rf"^{name}{{{said}}} (\S+)$", flags=re.M), 0.0
    async with httpx.AsyncClient(trust_env=False) as http:
        for worker in workers:
            page = (await http.get(f"http://{worker.ready['metrics']}/metrics")).text
            total += sum(map(float, sample.findall(page)))
    return total


async def prompt_tokens(workers: list[Started]) -> tuple[float, float]:
    """Return how many prompt tokens the workers computed and found in their pages."""
    name = "kvstore_worker_prompt_tokens_total"
    found = [await counted(workers, name, source=source) for source in ("computed", "hbm")]
    return found[0], found[1]


async def fork_pages(workers: list[Started]) -> tuple[float, float]:
    """Return how many pages replies to one prompt share, and how many were copied for them."""
    name = "kvstore_worker_fork_pages_total"
    found = [await counted(workers, name, kind=kind) for kind in ("shared", "copied")]
    return found[0], found[1]


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
        async with asyncio.timeout(PATIENCE_S):
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
        # The same worker has it in HBM; another that is predicted to be as soon loads it.
        assert sum(account["cached_tokens"].values()) >= 96, account
        assert account["computed_tokens"] <= 32, account


@pytest.mark.parametrize("options", [{}, {"no_store": True}], ids=["kept", "no_store"])
async def test_several_replies_share_one_prompt(
    frontend: FrontendServer, workers: list[Started], options: dict[str, bool]
) -> None:
    before, pages = await prompt_tokens(workers), await fork_pages(workers)
    asked: dict[str, Any] = {"prompt": f"{sorted(options)} {OTHER}", "max_tokens": 6}
    async with connect(frontend) as client:
        asked |= {"model": await only_model(client), "extra_body": {"kvstore": options}}
        reply = await client.completions.create(**asked, n=3, seed=3)
        computed, found = await prompt_tokens(workers)
        singles = [await client.completions.create(**asked, seed=3 + at) for at in range(3)]
    texts = [choice.text for choice in reply.choices]
    assert len(set(texts)) > 1
    assert texts == [one.choices[0].text for one in singles], "each is what its own seed gives"
    assert reply.usage is not None
    length = reply.usage.prompt_tokens
    full, rest = divmod(length, 16)
    assert rest, "its last page has room: else nothing would have to be copied"
    assert (computed - before[0], found - before[1]) == (length, 2 * length)
    shared, copied = await fork_pages(workers)
    assert (shared - pages[0], copied - pages[1]) == (2 * full, 2), "partial pages, and no others"


async def test_a_warm_prompt_is_found_by_the_other_worker(
    frontend: FrontendServer, workers: list[Started]
) -> None:
    messages = [{"role": "user", "content": "Sea charts, log books and quadrants. " * 12}]
    body: dict[str, Any] = {"messages": messages, "temperature": 0}
    url = f"http://{frontend.http_address}"
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S) as http:
        body["model"] = (await http.get("/v1/models")).json()["data"][0]["id"]
        asked = await http.post("/v1/chat/completions", json=body | {"max_tokens": 0})
        warm = asked.json()
        assert warm["usage"]["completion_tokens"] == 0
        assert warm["choices"][0]["finish_reason"] == "length"
        (other,) = [one for one in workers if one.ready["worker"] != warm["kvstore"]["worker"]]
        tokens = (await http.post("/tokenize", json={"messages": messages})).json()
        assert tokens["count"] == warm["usage"]["prompt_tokens"]
    packed = pack_tokens(tokens["tokens"])
    request = worker_pb2.RunRequest(tokens=packed, sampling=worker_pb2.Sampling(max_tokens=1))
    async with open_channel(other.ready["address"]) as channel:
        replies = [one async for one in worker_pb2_grpc.WorkerStub(channel).Run(request)]
    assert replies[0].cache.dram_tokens == (tokens["count"] - 1) // 16 * 16


@pytest.mark.slow
async def test_a_real_model_answers_in_a_form_and_calls_tools(frontend: FrontendServer) -> None:
    schema = {
        "type": "object",
        "properties": {"euros": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["euros"],
        "additionalProperties": False,
    }
    tool = {
        "type": "function",
        "function": {
            "name": "book_ticket",
            "description": "Books tickets for the museum.",
            "parameters": {
                "type": "object",
                "properties": {"count": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["count"],
                "additionalProperties": False,
            },
        },
    }
    system = {"role": "system", "content": SYSTEM}
    asking: dict[str, Any] = {"temperature": 0, "max_tokens": 48}
    async with connect(frontend) as client:
        asking["model"] = await only_model(client)
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        question = {"role": "user", "content": QUESTION + " Answer in JSON."}
        reply = await create(client, messages=[system, question], response_format=form, **asking)
        assert 1 <= json.loads(reply.choices[0].message.content)["euros"] <= 99
        booking = {"role": "user", "content": "Book two tickets, please."}
        reply = await create(client,
            messages=[system, booking], tools=[tool], tool_choice="required",
            parallel_tool_calls=False, **asking,
        )  # fmt: skip
        (call,) = reply.choices[0].message.tool_calls
        assert reply.choices[0].finish_reason == "tool_calls"
        assert call.function.name == "book_ticket"
        assert 1 <= json.loads(call.function.arguments)["count"] <= 9
        said = {"role": "assistant", "tool_calls": [call.model_dump()]}
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"booked": true}'}
        reply = await create(
            client,
            messages=[system, booking, said, result],
            tools=[tool],
            **asking | {"max_tokens": 2},
        )
        choice = reply.choices[0]
        assert choice.message.content or choice.message.tool_calls


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
