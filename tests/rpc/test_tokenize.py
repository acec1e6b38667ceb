"""`/tokenize` and `/detokenize` through a real HTTP server.

Reaches `kvworkers.frontends.openai.tokens`.
"""

import json
from typing import Any

import pytest
from kvworkers.frontends.access import role_for

from kvstore.rpc.identity import Role
from tests.byte_tokenizer import END
from tests.frontend_fixture import Shared
from tests.frontend_fixture import model as model
from tests.frontend_fixture import shared as shared

SYSTEM, USER, ASSISTANT = 257, 258, 259

pytestmark = [pytest.mark.timeout(60), pytest.mark.asyncio(loop_scope="module")]


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
