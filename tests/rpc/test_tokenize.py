"""`/tokenize` and `/detokenize` through a real HTTP server.

Reaches `kvworkers.frontends.openai.tokens`.
"""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.responses import JSONResponse
from kvworkers.frontends.access import role_for
from kvworkers.frontends.openai import tokens as openai_tokens
from kvworkers.frontends.tokenizer import ChatTokenizer

from kvstore.rpc.identity import Role
from tests.byte_tokenizer import END
from tests.frontend_fixture import Shared
from tests.frontend_fixture import model as model
from tests.frontend_fixture import shared as shared

SYSTEM, USER, ASSISTANT = 257, 258, 259
LONG = {"type": "function", "function": {"name": "f", "description": "x" * 4_000}}
CALL = {"function": {"name": "f", "arguments": json.dumps({"a": "x" * 4_000})}}

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_text_becomes_tokens_and_text_again(shared: Shared) -> None:
    for text in ("Lyon, é", "x" * 5_000, ""):
        asked = {"model": "scripted", "prompt": text}
        reply = (await shared.http.post("/tokenize", json=asked)).json()
        tokens = list(text.encode())
        assert reply == {
            "count": len(tokens), "max_model_len": 4096, "tokens": tokens, "token_strs": None
        }  # fmt: skip
        back = await shared.http.post("/detokenize", json={"model": "scripted", "tokens": tokens})
        assert back.json() == {"prompt": text}


async def test_a_conversation_becomes_what_a_worker_would_get(
    shared: Shared,
) -> None:
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]
    asked: dict[str, Any] = {"messages": messages, "return_token_strs": True}
    reply = (await shared.http.post("/tokenize", json=asked)).json()
    assert reply["tokens"] == [SYSTEM, 97, END, USER, 98, END, ASSISTANT]
    assert reply["token_strs"][:3] == ["<|system|>", "a", "<|end|>"]
    whole = await shared.http.post("/detokenize", json={"tokens": reply["tokens"]})
    assert whole.json()["prompt"] == "<|system|>a<|end|><|user|>b<|end|><|assistant|>"
    closed = await shared.http.post("/tokenize", json=asked | {"add_generation_prompt": False})
    assert closed.json()["tokens"] == reply["tokens"][:-1]
    assert not shared.worker.requests, "no worker is asked"


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": "ab" * 2_000, "return_token_strs": True},
        {"messages": [{"role": "user", "content": ""}], "tools": [LONG]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [CALL]}]},
    ],
    ids=["strings", "tools", "calls"],
)
async def test_long_texts_are_worked_on_off_the_loop(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    worked_in = set[int]()

    def noted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def work(*args: Any, **kwargs: Any) -> Any:
            worked_in.add(threading.get_ident())
            return plain(*args, **kwargs)

        return work

    for name in ("_conversation", "_text", "show"):
        monkeypatch.setattr(ChatTokenizer, name, noted(getattr(ChatTokenizer, name)))
    monkeypatch.setattr("kvworkers.frontends.openai.app.JSONResponse", noted(JSONResponse))
    reply = await shared.http.post("/tokenize", json=asked)
    assert reply.json()["count"] > 3_000
    assert worked_in and threading.get_ident() not in worked_in
    if asked.get("return_token_strs"):
        assert reply.json()["token_strs"] == list(asked["prompt"])


async def test_more_tokens_than_a_prompt_may_have_are_refused_by_field(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_tokens, "MAX_PROMPT_TOKENS", 10)
    said = [{"role": "user", "content": "a" * 11}]
    for asked, field in (({"prompt": "a" * 11}, "prompt"), ({"messages": said}, "messages")):
        reply = await shared.http.post("/tokenize", json=asked)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == field
        assert reply.json()["error"]["message"].startswith(field)
    assert (await shared.http.post("/tokenize", json={"prompt": "a" * 10})).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "messages": []}, 400),
        ("/tokenize", {"messages": []}, 400),
        ("/tokenize", {"messages": [{"role": "bard", "content": ""}]}, 400),
        ("/tokenize", {"prompt": "\ud800"}, 400),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404),
        ("/tokenize", {"prompt": 1}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [999]}, 400),
        ("/detokenize", {"tokens": "ab"}, 400),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404),
    ],
)
async def test_bad_questions_get_a_typed_answer(
    shared: Shared, path: str, fields: dict[str, Any], status: int
) -> None:
    reply = await shared.http.post(path, content=json.dumps(fields))
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_whoever_may_ask_for_text_may_ask_for_tokens() -> None:
    assert role_for("/tokenize") is role_for("/detokenize") is Role.CLIENT
