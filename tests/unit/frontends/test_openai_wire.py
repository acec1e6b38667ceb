import json
from typing import Any

import pytest
from kvworkers.frontends.generation import FieldError, Generation, SamplingChoice
from kvworkers.frontends.openai.chat import ChatBody
from kvworkers.frontends.openai.errors import failure
from kvworkers.frontends.openai.fields import parse
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


def test_what_asks_for_nothing_is_accepted() -> None:
    read(body(n=1, tools=[], logit_bias={}, presence_penalty=0.0, response_format={"type": "text"}))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"best_of": 2}, "best_of"),
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
