"""Replies that have to follow a form, from HTTP and gRPC down to a real model's logits.

The model's weights are random: whatever it says in form, it says because it may say nothing else.
Reaches `kvworkers.engine.grammar` and `kvworkers.frontends.openai.tools`.
"""

import asyncio
import json
from array import array
from typing import Any

import grpc.aio
import jsonschema
import pytest

from kvstore.core.errors import BadInput
from kvstore.core.limits import MAX_GRAMMAR_BYTES
from kvstore.core.names import pack_tokens
from kvstore.rpc.channel import open_channel
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.byte_tokenizer import END
from tests.patience import PATIENCE_S
from tests.served_fixture import Served
from tests.served_fixture import served as served

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Lyon", "Köln"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["city", "count", "tags"],
    "additionalProperties": False,
}
SHORT: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Lyon", "Köln"]}},
    "required": ["city"],
    "additionalProperties": False,
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Tells the time."}}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SHORT}}
HELLO = [{"role": "user", "content": "Say something."}]
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0},
        {"temperature": 1.5, "seed": 3, "top_p": 0.8, "n": 3},
        {"temperature": 1, "seed": 1, "extra_body": {"top_k": 5, "min_p": 0.05}},
        {"temperature": 0, "frequency_penalty": 2, "presence_penalty": 1},
        {"temperature": 0.7, "seed": 9, "logprobs": True, "logit_bias": {"32": 5}},
    ],
    ids=["greedy", "several", "cut", "penalised", "told"],
)
async def test_a_reply_is_what_its_schema_says(served: Served, how: dict[str, Any]) -> None:
    whole = await served.chat(messages=HELLO, max_tokens=400, response_format=FORM, **how)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    stream = await served.chat(
        messages=HELLO, max_tokens=400, response_format=FORM, stream=True, **how
    )
    texts = [""] * len(whole.choices)
    async for event in stream:
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


async def test_a_json_object_is_one_and_others_in_the_batch_say_what_they_would(
    served: Served,
) -> None:
    free: dict[str, Any] = {"prompt": "Free", "max_tokens": 60, "temperature": 1, "seed": 4}
    alone = await served.ask(**free)
    held = served.ask(
        "/v1/chat/completions", messages=HELLO, max_tokens=900, temperature=2, seed=2,
        response_format={"type": "json_object"}, logit_bias={str(ord("}")): 30},
    )  # fmt: skip
    reply, beside = await asyncio.gather(held, served.ask(**free))
    assert isinstance(json.loads(reply["choices"][0]["message"]["content"]), dict)
    assert beside["choices"][0]["text"] == alone["choices"][0]["text"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_named_tool_is_called_with_arguments_that_fit(served: Served, stream: bool) -> None:
    asked: dict[str, Any] = {
        "messages": HELLO, "max_tokens": 200, "temperature": 0,
        "tools": [CLOCK, WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    }  # fmt: skip
    made: tuple[str, ...]
    if not stream:
        reply = await served.chat(**asked)
        message, reason = reply.choices[0].message, reply.choices[0].finish_reason
        assert message.content is None
        (call,) = message.tool_calls
        made = (call.id, call.type, call.function.name, call.function.arguments)
    else:
        made, reason = ("",) * 4, None
        async for event in await served.chat(**asked, stream=True):
            (choice,) = event.choices
            assert not choice.delta.content
            reason = choice.finish_reason or reason
            for part in choice.delta.tool_calls or ():
                assert part.index == 0
                new = (part.id, part.type, part.function.name, part.function.arguments)
                made = tuple(old + (more or "") for old, more in zip(made, new, strict=True))
    assert reason == "tool_calls"
    assert made[0].startswith("call_") and made[1:3] == ("function", "get_weather")
    jsonschema.validate(json.loads(made[3]), SHORT)


async def test_calls_can_be_required_and_be_several(served: Served) -> None:
    biased = {str(END): -100}  # the end is unlikely, where there is a choice
    counts = set()
    for parallel, bias in ((True, biased), (False, biased), (True, {str(END): 100})):
        reply = await served.chat(
            messages=HELLO, max_tokens=250, temperature=0,
            tools=[CLOCK, WEATHER], tool_choice="required", parallel_tool_calls=parallel,
            logit_bias=bias,
        )  # fmt: skip
        calls = reply.choices[0].message.tool_calls
        assert {call.function.name for call in calls} <= {"clock", "get_weather"}
        counts.add((parallel, bias is biased, len(calls) > 1))
        if bias is not biased or not parallel:
            assert reply.choices[0].finish_reason == "tool_calls"
            assert reply.choices[0].message.content is None
    assert counts == {(True, True, True), (False, True, False), (True, False, False)}


async def test_a_bad_form_is_refused_by_place_before_any_work(served: Served) -> None:
    computed = served.prompt_tokens("computed")
    bad = {"type": "object", "properties": {"a": {"type": "strin"}}}
    tools = [CLOCK, {"type": "function", "function": {"name": "f", "parameters": bad}}]
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": bad}}
    for fields, param in (
        ({"response_format": named}, "response_format.json_schema.schema.properties.a"),
        ({"tools": tools}, "tools.1.function.parameters.properties.a"),
    ):
        asked = {"model": served.model, "messages": HELLO, **fields}
        reply = await served.http.post("/v1/chat/completions", json=asked)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == param
        assert "Invalid type: strin" in reply.json()["error"]["message"]
    assert served.prompt_tokens("computed") == computed
    page = (await served.http.get("/metrics")).text
    assert 'kvstore_requests_total{outcome="BadInput"}' in page and "FieldError" not in page


async def test_grpc_takes_a_schema_or_a_grammar(served: Served) -> None:
    async with open_channel(served.frontend.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def said(**fields: Any) -> str:
            sampling = worker_pb2.Sampling(max_tokens=300, grammar=fields.pop("grammar", ""))
            request = inference_pb2.GenerateRequest(text="Say", sampling=sampling, **fields)
            return "".join(
                [reply.text async for reply in stub.Generate(request, timeout=PATIENCE_S)]
            )

        jsonschema.validate(json.loads(await said(json_schema=json.dumps(SCHEMA))), SCHEMA)
        assert await said(grammar='start: "yes" | "no"') in ("yes", "no")
        for fields, what in (
            ({"json_schema": "{"}, "json_schema"),
            ({"json_schema": '{"type": "objekt"}'}, "objekt"),
            ({"json_schema": "{}", "grammar": 'start: "a"'}, "one of"),
            ({"grammar": "start: nowhere"}, "nowhere"),
            ({"grammar": "x" * (MAX_GRAMMAR_BYTES + 1)}, "sampling.grammar"),
            ({"json_schema": '{"a":' * 50_000}, "json_schema"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await said(**fields)
            error = error_from(failure.value)
            assert isinstance(error, BadInput) and what in str(error)


async def run(served: Served, tokens: bytes, **fields: Any) -> list[int]:
    """Return what the worker itself generates behind packed tokens."""
    reply_tokens = fields.pop("reply_tokens", 0)
    request = worker_pb2.RunRequest(
        tokens=tokens, sampling=worker_pb2.Sampling(max_tokens=160, **fields),
        reply_tokens=reply_tokens,
    )  # fmt: skip
    async with open_channel(served.worker.address) as channel:
        replies = worker_pb2_grpc.WorkerStub(channel).Run(request, timeout=PATIENCE_S)
        return [token async for reply in replies for token in array("I", reply.tokens)]


async def test_a_worker_goes_on_in_a_form_and_in_penalties_that_another_began(
    served: Served,
) -> None:
    prompt = pack_tokens(b"Say something.")
    for fields in (
        {"grammar": "start: %json " + json.dumps(SCHEMA), "temperature": 1.0},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5, "stop_token_ids": [0]},
    ):
        fields |= {"seed": 8, "has_seed": True}
        whole = await run(served, prompt, **fields)
        for done in (1, 9, len(whole) - 1):
            begun = prompt + pack_tokens(whole[:done])
            left = await run(
                served, begun, **fields, reply_tokens=done, 
            )  # fmt: skip
            assert whole[:done] + left[: len(whole) - done] == whole


async def test_a_reply_that_cannot_be_followed_to_its_end_does_not_pass_for_whole(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvworkers.engine.grammar.STEP_ITEMS", 30)
    body = {"model": served.model, "messages": HELLO, "max_tokens": 400, "seed": 1}
    names = {str(at): {"type": "string", "maxLength": 3} for at in range(60)}
    wide = {"type": "object", "properties": names, "additionalProperties": False}
    body |= {"response_format": {"type": "json_schema", "json_schema": {"schema": wide}}}
    reply = await served.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["message"].startswith("grammar: ")


async def test_what_a_worker_cannot_follow_is_a_typed_error(served: Served) -> None:
    form = {"grammar": 'start: "yes"'}
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await run(served, pack_tokens(b"Say no"), **form, reply_tokens=2)
    assert isinstance(error_from(failure.value), BadInput)
    for bad in ({"grammar": "start: x"}, form | {"ignore_eos": True}, {"logit_bias": {999: 1.0}}):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await run(served, pack_tokens(b"Say"), **bad)
        assert isinstance(error_from(failure.value), BadInput)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await run(served, pack_tokens(b"Say"), reply_tokens=4)
    assert "reply_tokens" in str(error_from(failure.value))
