import json
from typing import Any

import pytest
from kvworkers.frontends.generation import FieldError, Generation, SamplingChoice
from kvworkers.frontends.messages import Message, ToolCall
from kvworkers.frontends.openai.chat import ChatBody
from kvworkers.frontends.openai.errors import failure
from kvworkers.frontends.openai.fields import parse

from kvstore.core.errors import (
    BadInput,
    Corrupt,
    Forbidden,
    KvStoreError,
    NotFound,
    Refused,
    TooLarge,
    Unauthenticated,
    Unreachable,
    Unsupported,
)

TOOL = {"type": "function", "function": {"name": "f"}}
CALLING = {"role": "assistant", "content": None}
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def body(**fields: Any) -> bytes:
    return json.dumps(HELLO | fields).encode()


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def call(name: str, arguments: str) -> dict[str, Any]:
    return named(name) | {"id": "c", "function": {"name": name, "arguments": arguments}}


def read(raw: bytes) -> Generation:
    """Return the request in a chat body."""
    (made,) = parse(raw, ChatBody).generations("r")
    return made


def test_a_body_becomes_a_request() -> None:
    raw = body(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": part} for part in "ab"]},
            {"role": "assistant", "content": None},
        ],
        stop="x", seed=3, temperature=0, top_p=0.5, max_completion_tokens=9, max_tokens=1,
        logprobs=True, top_logprobs=4, top_k=-1, user="someone",
        kvstore={"no_store": True, "cache_salt": "s"},
    )  # fmt: skip
    made = read(raw)
    assert made.messages == [
        Message("system", "be brief"), Message("user", "ab"), Message("assistant", "")
    ]  # fmt: skip
    assert made.sampling == SamplingChoice(
        max_tokens=9, temperature=0.0, top_p=0.5, seed=3, logprobs=4
    )
    assert (made.stop, made.no_store, made.no_read, made.cache_salt) == (("x",), True, False, b"s")
    assert read(body()).sampling == SamplingChoice()
    assert read(body(logprobs=True)).sampling.logprobs == 1
    assert read(body(stop=["a", "b"])).stop == ("a", "b")


def test_tools_and_forms_become_what_a_reply_has_to_follow() -> None:
    raw = body(
        tools=[TOOL], tool_choice=named("f"), parallel_tool_calls=True,
        messages=[
            {"role": "user", "content": "go"},
            {"role": "assistant", "tool_calls": [call("f", '{"a": 1}')]},
            {"role": "tool", "tool_call_id": "c", "content": "done"},
        ],
    )  # fmt: skip
    made = read(raw)
    assert made.messages is not None and made.messages[1].calls == (ToolCall("f", {"a": 1}),)
    assert [tool.name for tool in made.tools] == ["f"]
    assert made.shape is not None and made.shape.place == "tools"
    none = read(body(tools=[TOOL], tool_choice="none"))
    assert (none.tools, none.shape) == ((), None)
    form = read(body(response_format={"type": "json_schema", "json_schema": {"schema": True}}))
    assert form.shape is not None
    assert form.shape.schemas == (("response_format.json_schema.schema", True),)


def test_what_shapes_logits_becomes_a_choice() -> None:
    raw = body(frequency_penalty=1, presence_penalty=-1, min_p=0.1, logit_bias={"5": -100})
    made = read(raw).sampling
    assert (made.frequency_penalty, made.presence_penalty) == (1, -1)
    assert (made.min_p, made.logit_bias) == (0.1, ((5, -100.0),))
    wire = made.to_proto(3, "start: A")
    assert (wire.grammar, dict(wire.logit_bias), wire.presence_penalty) == (
        "start: A", {5: -100.0}, -1.0
    )  # fmt: skip


def test_what_asks_for_nothing_is_accepted() -> None:
    read(body(n=1, tools=[], logit_bias={}, presence_penalty=0.0, response_format={"type": "text"}))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": named("g")}, "tool_choice"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"messages": [CALLING | {"tool_calls": [call("f", "[]")]}]}, "messages.0.tool_calls.0"),
        ({"messages": [CALLING | {"tool_calls": [call("f", "{")]}]}, "messages.0.tool_calls.0"),
        (
            {"messages": [CALLING | {"tool_calls": [call("f", r'{"a": "\ud800"}')]}]},
            "messages.0.tool_calls.0",
        ),
        (
            {"messages": [CALLING | {"tool_calls": [call("f", '{"a":' * 50_000)]}]},
            "messages.0.tool_calls.0",
        ),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"guided_choice": ["a", "b"]}, "guided_choice"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1_025)}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a.[key]"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": -3, "logprobs": True}, "top_logprobs"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"kvstore": {"nostore": True}}, "kvstore.nostore"),
        ({"model": None}, "model"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(FieldError) as error:
        read(body(**fields))
    if param is not None:
        assert failure(error.value)[1]["error"]["param"] == param
        assert param in str(error.value)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b'{"model": "\xff"}', b'"text"', body(stop="\ud800")]
)
def test_what_is_no_request_is_refused(raw: bytes) -> None:
    with pytest.raises(BadInput):
        read(raw)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BadInput("x"), 400, None),
        (TooLarge("x"), 400, "context_length_exceeded"),
        (NotFound("x"), 404, "model_not_found"),
        (Refused("x", 1_500), 429, "rate_limit_exceeded"),
        (Unreachable("x"), 503, None),
        (Unauthenticated("x"), 401, None),
        (Forbidden("x"), 403, None),
        (Unsupported("x"), 400, None),
        (Corrupt("x"), 500, None),
    ],
)
def test_errors_have_openai_s_shape(error: KvStoreError, status: int, code: str | None) -> None:
    found, made, headers = failure(error)
    assert found == status
    assert set(made["error"]) == {"message", "type", "param", "code"}
    assert made["error"]["code"] == code
    assert headers.get("Retry-After") == ("2" if status == 429 else None)
