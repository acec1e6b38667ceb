import json
from typing import Any

import pytest
from kvworkers.frontends.generation import SamplingChoice
from kvworkers.frontends.openai_wire import FieldError, failure, parse
from kvworkers.frontends.tokenizer import Message

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

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def body(**fields: Any) -> bytes:
    return json.dumps(HELLO | fields).encode()


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
    made = parse(raw).generation("r")
    assert made.messages == [
        Message("system", "be brief"), Message("user", "ab"), Message("assistant", "")
    ]  # fmt: skip
    assert made.sampling == SamplingChoice(
        max_tokens=9, temperature=0.0, top_p=0.5, seed=3, logprobs=4
    )
    assert (made.stop, made.no_store, made.no_read, made.cache_salt) == (("x",), True, False, b"s")
    assert parse(body()).generation("r").sampling == SamplingChoice()
    assert parse(body(logprobs=True)).generation("r").sampling.logprobs == 1
    assert parse(body(stop=["a", "b"])).generation("r").stop == ("a", "b")


def test_what_asks_for_nothing_is_accepted() -> None:
    parse(
        body(n=1, tools=[], logit_bias={}, presence_penalty=0.0, response_format={"type": "text"})
    ).generation("r")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
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
        parse(body(**fields)).generation("r")
    if param is not None:
        assert failure(error.value)[1]["error"]["param"] == param
        assert param in str(error.value)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b'{"model": "\xff"}', b'"text"', body(stop="\ud800")]
)
def test_what_is_no_request_is_refused(raw: bytes) -> None:
    with pytest.raises(BadInput):
        parse(raw)


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
