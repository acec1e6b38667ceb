"""Completions and replies side by side, through a real HTTP server over scripted workers.

Reaches `kvworkers.frontends.openai.completions`, `kvworkers.frontends.openai.usage`,
`kvworkers.frontends.openai.chances` and `kvworkers.frontends.choices`.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from kvworkers.frontends.pipeline import PipelineConfig
from kvworkers.frontends.server import FrontendConfig, FrontendServer, serving

from kvstore.core.errors import Unsupported
from kvstore.core.names import pack_tokens
from kvstore.router.members import Member
from tests.frontend_fixture import TEXT, Shared, eventually
from tests.frontend_fixture import client as client
from tests.frontend_fixture import frontend as frontend
from tests.frontend_fixture import http as http
from tests.frontend_fixture import model as model
from tests.frontend_fixture import shared as shared
from tests.frontend_fixture import worker as worker
from tests.patience import PATIENCE_S
from tests.scripted_worker import ScriptedWorker

SAID = len(TEXT.encode())
PROMPT = "Lyon lies where two rivers meet: the Rhone and the"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_text_is_continued_as_the_openai_client_asks(shared: Shared) -> None:
    for cached in (0, 48):
        reply = await shared.client.completions.create(
            model="scripted", prompt=PROMPT, max_tokens=40, seed=7, stop="Ende", echo=cached > 0
        )
        (choice,) = reply.choices
        said = TEXT.removesuffix("Ende")
        assert (choice.text, choice.finish_reason) == (PROMPT * (cached > 0) + said, "stop")
        assert reply.object == "text_completion" and reply.id.startswith("cmpl-")
        assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens == len(PROMPT)
        assert reply.usage.prompt_tokens_details.cached_tokens == cached
        assert reply.model_extra is not None and reply.model_extra["kvstore"]["worker"] == "w"
    sampling = shared.worker.requests[-1].sampling
    assert (sampling.max_tokens, sampling.seed, sampling.has_seed) == (40, 7, True)
    assert shared.worker.requests[-1].tokens == pack_tokens(PROMPT.encode())


@pytest.mark.asyncio(loop_scope="module")
async def test_every_kind_of_prompt_is_taken_and_choices_are_numbered(shared: Shared) -> None:
    prompts: list[tuple[Any, list[str]]] = [
        ([76, 121], ["Ly"]),
        (["ab", "cd", "ef"], ["ab", "cd", "ef"]),
        ([[97], [98, 99]], ["a", "bc"]),
    ]
    for prompt, texts in prompts:
        reply = await shared.client.completions.create(
            model="scripted", prompt=prompt, max_tokens=64, echo=True
        )
        assert [choice.index for choice in reply.choices] == list(range(len(texts)))
        assert [choice.text for choice in reply.choices] == [text + TEXT for text in texts]
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == sum(map(len, texts))
        assert reply.usage.completion_tokens == SAID * len(texts)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_stream_carries_each_choice_and_ends_with_the_usage(shared: Shared) -> None:
    stream = await shared.client.completions.create(
        model="scripted", prompt=["ab", "cd"], max_tokens=64, n=2, echo=True, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts, usages = [""] * 4, []
    reasons: list[str | None] = [None] * 4
    async for event in stream:
        usages += [event.usage] if event.usage else []
        for choice in event.choices:
            assert not usages, "nothing comes behind the usage"
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == ["ab" + TEXT, "ab" + TEXT, "cd" + TEXT, "cd" + TEXT]
    assert reasons == ["stop"] * 4
    assert [(one.prompt_tokens, one.completion_tokens) for one in usages] == [(4, 4 * SAID)]


@pytest.mark.asyncio(loop_scope="module")
async def test_log_probabilities_come_in_the_older_form(shared: Shared) -> None:
    asked = {"model": "scripted", "prompt": "a", "max_tokens": 5, "logprobs": 1}
    reply = (await shared.http.post("/v1/completions", json=asked)).json()
    found = reply["choices"][0]["logprobs"]
    # `ü` is two tokens and neither a text of its own: their names are their ids.
    assert found["tokens"] == ["G", "r", "token_id:195", "token_id:188", "token_id:195"]
    assert found["token_logprobs"] == [-0.5] * 5
    assert found["top_logprobs"][0] == {"G": -0.5}
    assert found["text_offset"] == [0, 1, 2, 3, 4]
    plain = (await shared.http.post("/v1/completions", json=asked | {"logprobs": None})).json()
    assert plain["choices"][0]["logprobs"] is None


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "the end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "structured_outputs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "prompt"),
        ({"prompt": ["a", ""]}, None),
        ({"prompt": [999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[97], [97, -(1 << 70)]]}, "prompt"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, None),
        ({"n": 0}, "n"),
        ({"model": None}, "model"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    shared: Shared, fields: dict[str, Any], param: str | None
) -> None:
    reply = await shared.http.post(
        "/v1/completions", json={"model": "scripted", "prompt": "a"} | fields
    )
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert reply.json()["error"]["param"] == param


@pytest.mark.asyncio(loop_scope="module")
async def test_what_asks_for_no_form_is_accepted(shared: Shared) -> None:
    for fields in (
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto"},
        {"response_format": None, "tools": None, "tool_choice": "none", "guided_json": None},
    ):
        asked = {"model": "scripted", "prompt": "a", "max_tokens": 64} | fields
        assert (await shared.http.post("/v1/completions", json=asked)).status_code == 200


async def test_the_other_replies_go_where_the_first_is_placed_before_its_first_token(
    frontend: FrontendServer, worker: ScriptedWorker, client: openai.AsyncOpenAI
) -> None:
    second = ScriptedWorker("v", reply=list(TEXT.encode()))
    await second.start()
    members = [Member("worker", "w", worker.address), Member("worker", "v", second.address)]
    await frontend.set_members(members)
    await eventually(lambda: frontend.worker_ready("v"), "both are ready")
    worker.faults.hang_after = second.faults.hang_after = 0
    asked = asyncio.create_task(
        client.chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": PROMPT}], n=3, seed=2**64 - 2
        )
    )
    await eventually(lambda: worker.running + second.running == 3, "all of them run")
    busy, idle = (worker, second) if worker.running else (second, worker)
    busy.faults.hang_after = -1
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await eventually(lambda: busy.running == 0, "and is free again")
    assert (len(busy.requests), len(idle.requests)) == (3, 0)
    idle.faults.hang_after = -1
    reply = await client.chat.completions.create(
        model="scripted", messages=[{"role": "user", "content": PROMPT}], n=3, seed=2**64 - 2
    )
    assert [choice.message.content for choice in reply.choices] == [TEXT] * 3
    ours = [(choice.model_extra or {})["kvstore"]["worker"] for choice in reply.choices]
    assert len(set(ours)) == 1, "who has the pages is asked for the others"
    asked_of = [one for w in (worker, second) for one in w.requests][-3:]
    seeds = sorted(one.sampling.seed for one in asked_of)
    assert seeds == [0, 2**64 - 2, 2**64 - 1]
    assert len({one.request_id for one in asked_of}) == 3
    assert reply.usage is not None and reply.usage.completion_tokens == 3 * SAID
    await second.stop()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_reply_that_fails_ends_the_others(
    http: httpx.AsyncClient, worker: ScriptedWorker, stream: bool
) -> None:
    async def refuse_later_ones(request: Any) -> Any:
        if request.request_id.endswith("-1"):
            raise Unsupported("scripted refusal")
        async for reply in ScriptedWorker.run(worker, request):
            yield reply
        await asyncio.Event().wait()  # its last words came; it would go on for ever

    worker.run = refuse_later_ones  # type: ignore[method-assign]
    asked = {"model": "scripted", "prompt": "a", "n": 2, "stream": stream}
    reply = await http.post("/v1/completions", json=asked)
    assert reply.status_code == (200 if stream else 400)
    last = [line for line in reply.text.split("\n") if line][-1].removeprefix("data: ")
    assert json.loads(last)["error"]["message"] == "scripted refusal"
    await eventually(lambda: worker.running == 0, "nothing runs any more")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_every_choice(
    frontend: FrontendServer, worker: ScriptedWorker, stream: bool
) -> None:
    worker.faults.hang_after = 2
    asked = {"model": "scripted", "prompt": ["a", "b"], "n": 2, "stream": stream}
    async with httpx.AsyncClient(trust_env=False) as http:
        url = f"http://{frontend.http_address}/v1/completions"
        asking = asyncio.create_task(http.post(url, json=asked))
        await eventually(lambda: worker.running == 4, "all of them run")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await eventually(lambda: worker.running == 0, "the worker is free again")
    assert worker.cancelled == 4


async def test_several_replies_are_let_in_together_or_not_at_all(
    model: Path, worker: ScriptedWorker
) -> None:
    config = FrontendConfig(model=model, pipeline=PipelineConfig(max_in_flight=3))
    worker.faults.hang_after = 1
    several = {"model": "scripted", "prompt": "a", "n": 3}
    async with serving(config) as server:
        await server.set_members([Member("worker", "w", worker.address)])
        await eventually(server.ready, "the worker is ready")
        url = f"http://{server.http_address}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S) as http:

            async def ask(**fields: Any) -> httpx.Response:
                return await http.post("/v1/completions", json=several | fields)

            one = asyncio.create_task(ask(n=1))
            await eventually(lambda: worker.running == 1, "one place is taken")
            asked = len(worker.requests)
            assert (await ask(stream=True)).status_code == 429, "before its first chunk"
            assert len(worker.requests) == asked, "and nothing of it ran"
            one.cancel()
            await asyncio.gather(one, return_exceptions=True)
            await eventually(lambda: worker.running == 0, "the place is free again")
            worker.faults.hang_after = 0
            asked = len(worker.requests)
            three = asyncio.create_task(ask())
            await eventually(lambda: worker.running == 3, "all three run before any token is there")
            assert len({one.siblings for one in worker.requests[asked:]} - {""}) == 1
            assert (await ask(n=1)).status_code == 429
            three.cancel()
            await asyncio.gather(three, return_exceptions=True)
            await eventually(lambda: worker.running == 0, "all places are free again")
            worker.faults.hang_after = -1
            reply = await ask(n=5)  # more than there are places: some wait for others
            assert [one["text"] for one in reply.json()["choices"]] == [TEXT] * 5


async def test_one_request_runs_few_of_its_replies_at_once(
    frontend: FrontendServer, worker: ScriptedWorker, http: httpx.AsyncClient
) -> None:
    worker.faults.hang_after = 1
    asked = {"model": "scripted", "prompt": ["a"] * 20}
    asking = asyncio.create_task(http.post("/v1/completions", json=asked))
    await eventually(lambda: worker.running == 8, "as many as may run")
    worker.faults.hang_after = -1
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await eventually(lambda: worker.running == 0, "the worker is free again")
    assert len(worker.requests) == 8
    worker.requests.clear()
    reply = await http.post("/v1/completions", json=asked)
    assert [choice["text"] for choice in reply.json()["choices"]] == [TEXT] * 20
    assert len(worker.requests) == 20
