"""Both frontends over scripted workers: what users send and what they get.

Reaches `kvworkers.frontends.openai.app`, `kvworkers.frontends.replies` and
`kvworkers.frontends.grpc_frontend`.
"""

import asyncio
import json
import socket
from array import array
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import openai
import pytest
from kvworkers.frontends.server import FrontendConfig, FrontendServer
from kvworkers.frontends.tokenizer import ChatTokenizer

from kvstore.core.errors import BadInput, NotFound, Refused
from kvstore.core.names import pack_tokens
from kvstore.rpc.channel import open_channel
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from tests.byte_tokenizer import END, make_byte_tokenizer
from tests.frontend_fixture import TEXT, Shared, eventually
from tests.frontend_fixture import client as client
from tests.frontend_fixture import frontend as frontend
from tests.frontend_fixture import http as http
from tests.frontend_fixture import model as model
from tests.frontend_fixture import shared as shared
from tests.frontend_fixture import worker as worker
from tests.scripted_worker import ScriptedWorker

ASK = "What is the capital of France, and which rivers meet in Lyon?"
GREEDY = worker_pb2.Sampling(max_tokens=64)


@pytest.fixture
async def stub(frontend: FrontendServer) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    async with open_channel(frontend.grpc_address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": ASK}], **fields}


async def test_the_openai_client_gets_a_whole_reply(client: openai.AsyncOpenAI) -> None:
    # The prompt has exactly four blocks: the last one is computed, for logits to sample from.
    for cached in (0, 48):
        reply = await client.chat.completions.create(**ask(temperature=0))
        choice = reply.choices[0]
        assert (choice.message.content, choice.finish_reason) == (TEXT, "stop")
        assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens == len(ASK) + 3
        assert reply.usage.completion_tokens == len(TEXT.encode())
        assert reply.usage.prompt_tokens_details.cached_tokens == cached
        ours = reply.model_extra["kvstore"]
        assert ours["cached_tokens"]["hbm"] == cached
        assert ours["computed_tokens"] == len(ASK) + 3 - cached
        assert (ours["worker"], ours["retries"], ours["miss_reason"]) == ("w", 0, "absent")
        assert ours["ttft_ms"] > 0


@pytest.mark.asyncio(loop_scope="module")
async def test_the_openai_client_gets_a_stream_of_whole_characters(shared: Shared) -> None:
    stream = await shared.client.chat.completions.create(
        **ask(stream=True, stream_options={"include_usage": True})
    )
    pieces: list[str] = []
    reasons: list[str] = []
    usage = None
    async for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            pieces.append(choice.delta.content or "")
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert "".join(pieces) == TEXT
    assert "🌍" in pieces and not any("\ufffd" in piece for piece in pieces)
    assert reasons == ["stop"]
    assert usage is not None and usage.completion_tokens == len(TEXT.encode())


async def test_a_stream_that_breaks_ends_with_an_error(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    worker.faults.break_after = 1
    reply = await http.post("/v1/chat/completions", json=ask(stream=True))
    assert reply.status_code == 200
    lines = [line for line in reply.text.split("\n") if line]
    # Every attempt adds one letter before it breaks; after the last one allowed the error follows.
    assert [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines[:3]] == [
        "", "G", "r",
    ]  # fmt: skip
    assert json.loads(lines[-1][6:])["error"]["type"] == "service_unavailable"
    # What each is told of the reply so far: penalties and grammars go on behind it.
    assert [one.reply_tokens for one in worker.requests] == [0, 1, 2, 3]


@pytest.mark.asyncio(loop_scope="module")
async def test_long_texts_are_tokenised_off_the_loop_and_templates_may_refuse(
    shared: Shared,
) -> None:
    long = "é" * 1_500
    await shared.http.post(
        "/v1/chat/completions", json=ask(messages=[{"role": "user", "content": long}])
    )
    prompt = array("I", shared.worker.requests[-1].tokens)
    assert bytes(token for token in prompt if token < END).decode() == long
    refused = await shared.http.post(
        "/v1/chat/completions", json=ask(messages=[{"role": "tool", "content": "a"}])
    )
    assert refused.status_code == 400
    assert "a tool cannot begin" in refused.json()["error"]["message"]


async def test_stop_strings_and_limits_end_a_reply(
    client: openai.AsyncOpenAI, worker: ScriptedWorker
) -> None:
    worker.faults.hang_after = 14  # it would never end by itself
    stopped = await client.chat.completions.create(**ask(stop=[", 🌍"]))
    assert stopped.choices[0].message.content == "Grüße"
    assert stopped.choices[0].finish_reason == "stop"
    await eventually(lambda: worker.running == 0, "a stopped reply frees its worker")
    limited = await client.chat.completions.create(**ask(max_completion_tokens=3))
    assert limited.choices[0].message.content == "Gr\ufffd"  # the third byte is half a character
    assert limited.choices[0].finish_reason == "length"


@pytest.mark.asyncio(loop_scope="module")
async def test_log_probabilities_come_with_the_tokens(shared: Shared) -> None:
    reply = await shared.client.chat.completions.create(
        **ask(logprobs=True, top_logprobs=2, max_tokens=2)
    )
    content = reply.choices[0].logprobs.content
    assert content is not None
    assert [(one.token, one.logprob, one.bytes) for one in content] == [
        ("G", -0.5, [71]), ("r", -0.5, [114])
    ]  # fmt: skip
    assert [(one.token, one.logprob) for one in content[0].top_logprobs] == [
        ("G", -0.5), ("\x01", -1.5)
    ]  # fmt: skip
    alone = await shared.client.chat.completions.create(**ask(logprobs=True, max_tokens=3))
    content = alone.choices[0].logprobs.content
    assert content is not None and [one.top_logprobs for one in content] == [[], [], []]
    assert content[2].bytes is None, "half a character has no bytes that we know"


async def test_a_reply_without_tokens_has_its_time_too(
    client: openai.AsyncOpenAI, worker: ScriptedWorker
) -> None:
    worker.reply = []
    reply = await client.chat.completions.create(**ask())
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("", "stop")
    assert reply.model_extra["kvstore"]["ttft_ms"] > 0


async def test_what_reads_no_cache_is_priced_as_uncached_and_followed_by_nobody(
    client: openai.AsyncOpenAI, frontend: FrontendServer
) -> None:
    await client.chat.completions.create(**ask())
    extra = {"kvstore": {"no_read": True, "no_store": True}}
    await client.chat.completions.create(**ask(extra_body=extra))
    name = "kvstore_predicted_hit_error_tokens_sum"
    # The first was predicted rightly to hit nothing; the worker's double ignores `no_read`.
    assert frontend.registry.get_sample_value(name) == 48


@pytest.mark.asyncio(loop_scope="module")
async def test_sampling_travels_to_the_worker(shared: Shared) -> None:
    extra = {"kvstore": {"no_read": True, "no_store": True, "cache_salt": "s"}, "top_k": 5}
    await shared.client.chat.completions.create(
        **ask(seed=7, temperature=0.5, top_p=0.25, max_tokens=30, extra_body=extra)
    )
    sent = shared.worker.requests[-1]
    assert (sent.no_read, sent.no_store, sent.cache_salt) == (True, True, b"s")
    assert (sent.sampling.seed, sent.sampling.has_seed, sent.sampling.top_k) == (7, True, 5)
    assert (sent.sampling.temperature, sent.sampling.top_p) == (0.5, 0.25)
    assert sent.sampling.max_tokens == 30 and 0 < sent.deadline_ms <= 300_000
    prompt = array("I", sent.tokens)
    assert bytes(token for token in prompt if token < END).decode() == ASK


async def test_models_health_and_metrics(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, frontend: FrontendServer
) -> None:
    assert [one.id async for one in client.models.list()] == ["scripted"]
    assert (await http.get("/health")).status_code == 200
    await client.chat.completions.create(**ask())
    page = (await http.get("/metrics")).text
    assert 'kvstore_requests_total{outcome="stop"} 1.0' in page
    assert f"kvstore_prompt_tokens_total {len(ASK) + 3}.0" in page
    assert 'kvstore_ttft_seconds_count{cached="no"} 1.0' in page
    assert "kvstore_requests_in_flight 0.0" in page
    await frontend.set_members([])
    assert (await http.get("/health")).status_code == 503
    gone = await http.post("/v1/chat/completions", json=ask())
    assert gone.status_code == 503
    assert gone.json()["error"]["type"] == "service_unavailable"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "other"}, 404, "model_not_found"),
        ({"messages": []}, 400, None),
        ({"max_tokens": -1}, 400, None),
        ({"max_tokens": 5_000}, 400, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 5_000}]}, 400, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None),
        ({"n": 0}, 400, None),
        ({"temperature": -1}, 400, None),
        ({"stop": [""]}, 400, None),
        ({"stream": True, "messages": []}, 400, None),
    ],
)
async def test_bad_requests_get_a_typed_answer(
    shared: Shared, fields: dict[str, Any], status: int, code: str | None
) -> None:
    reply = await shared.http.post("/v1/chat/completions", content=json.dumps(ask(**fields)))
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code and error["message"]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe{}", b"[]", b"x" * 70_000])
async def test_bad_bodies_get_a_typed_answer(shared: Shared, raw: bytes) -> None:
    reply = await shared.http.post("/v1/chat/completions", content=raw)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.asyncio(loop_scope="module")
async def test_unknown_paths_have_the_same_shape(shared: Shared) -> None:
    assert (await shared.http.get("/v1/nothing")).json()["error"]["message"]
    assert (await shared.http.get("/v1/chat/completions")).status_code == 405


async def test_a_refusal_says_when_to_come_back(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    worker.faults.refuse = Refused("full", 2_500)
    reply = await http.post("/v1/chat/completions", json=ask())
    assert reply.status_code == 429
    assert reply.headers["Retry-After"] == "3"
    assert reply.json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_worker(
    frontend: FrontendServer, worker: ScriptedWorker, stream: bool
) -> None:
    worker.faults.hang_after = 2
    url = f"http://{frontend.http_address}/v1/chat/completions"
    async with httpx.AsyncClient(trust_env=False) as http:
        asking = asyncio.create_task(http.post(url, json=ask(stream=stream)))
        await eventually(lambda: worker.running == 1, "the worker runs it")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await eventually(lambda: worker.running == 0, "the worker is free again")
    assert worker.cancelled == 1


async def test_grpc_streams_text_tokens_and_the_account(
    stub: inference_pb2_grpc.InferenceStub,
) -> None:
    conversation = inference_pb2.Messages(
        messages=[inference_pb2.Message(role="user", content=ASK)]
    )
    request = inference_pb2.GenerateRequest(messages=conversation, sampling=GREEDY)
    replies = [reply async for reply in stub.Generate(request)]
    assert "".join(reply.text for reply in replies) == TEXT
    assert b"".join(reply.tokens for reply in replies) == pack_tokens(TEXT.encode())
    assert replies[0].cache.prompt_tokens == len(ASK) + 3
    assert replies[0].ttft_ms > 0
    assert replies[-1].finish_reason == "stop"
    assert replies[-1].output_tokens == len(TEXT.encode())
    models = await stub.ListModels(inference_pb2.ListModelsRequest())
    assert [(one.id, one.max_model_tokens) for one in models.models] == [("scripted", 4096)]


async def test_grpc_takes_text_and_tokens(
    stub: inference_pb2_grpc.InferenceStub, worker: ScriptedWorker
) -> None:
    packed = pack_tokens(b"abc")
    for prompt in (
        inference_pb2.GenerateRequest(text="abc", sampling=GREEDY),
        inference_pb2.GenerateRequest(
            tokens=inference_pb2.TokenIds(packed=packed), sampling=GREEDY
        ),
    ):
        replies = [reply async for reply in stub.Generate(prompt)]
        assert "".join(reply.text for reply in replies) == TEXT
        assert worker.requests[-1].tokens == packed


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (inference_pb2.GenerateRequest(text="a", model="other"), NotFound),
        (inference_pb2.GenerateRequest(), BadInput),
        (
            inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds(packed=pack_tokens([999]))),
            BadInput,
        ),
        (inference_pb2.GenerateRequest(text="a" * 5_000), BadInput),
    ],
    ids=["model", "nothing", "vocabulary", "long"],
)
async def test_bad_grpc_requests_get_a_typed_error(
    stub: inference_pb2_grpc.InferenceStub,
    bad: inference_pb2.GenerateRequest,
    expected: type[Exception],
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.Generate(bad).read()
    assert isinstance(error_from(failure.value), expected)


async def test_a_cancelled_grpc_call_frees_its_worker(
    stub: inference_pb2_grpc.InferenceStub, worker: ScriptedWorker
) -> None:
    worker.faults.hang_after = 2
    call = stub.Generate(inference_pb2.GenerateRequest(text="a", sampling=GREEDY))
    await call.read()
    call.cancel()
    await eventually(lambda: worker.running == 0, "the worker is free again")


async def test_a_taken_port_is_named(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BadInput, match=address):
            await FrontendServer(FrontendConfig(model=model, http=address)).start()
    with pytest.raises(BadInput, match="not host:port"):
        FrontendConfig(model=model, grpc="nowhere")


def test_ends_of_replies_come_from_the_generation_settings(model: Path, tmp_path: Path) -> None:
    made = make_byte_tokenizer(tmp_path)
    settings = made / "generation_config.json"
    assert ChatTokenizer(made).eos_token_ids == {END}
    settings.write_text('{"eos_token_id": [1, 2]}')
    assert ChatTokenizer(made).eos_token_ids == {1, 2}
    settings.unlink()
    assert ChatTokenizer(made).eos_token_ids == {END}
    settings.write_text("{")
    with pytest.raises(BadInput, match="generation_config"):
        ChatTokenizer(made)


def test_a_directory_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=str(tmp_path)):
        FrontendServer(FrontendConfig(model=tmp_path))
