"""`/tokenize` and `/detokenize` through a real HTTP server.

Reaches `kvworkers.frontends.openai.tokens`.
"""

import json
from typing import Any

import httpx
import pytest
from kvworkers.frontends.access import role_for

from kvstore.rpc.identity import Role
from tests.byte_tokenizer import END
from tests.frontend_fixture import frontend as frontend
from tests.frontend_fixture import http as http
from tests.frontend_fixture import model as model
from tests.frontend_fixture import worker as worker
from tests.scripted_worker import ScriptedWorker

SYSTEM, USER, ASSISTANT = 257, 258, 259

pytestmark = pytest.mark.timeout(60)


async def test_a_text_becomes_tokens_and_text_again(http: httpx.AsyncClient) -> None:
    for text in ("Lyon, é", "x" * 5_000, ""):
        asked = {"model": "scripted", "prompt": text}
        reply = (await http.post("/tokenize", json=asked)).json()
        tokens = list(text.encode())
        assert reply == {
            "count": len(tokens), "max_model_len": 4096, "tokens": tokens, "token_strs": None
        }  # fmt: skip
        back = await http.post("/detokenize", json={"model": "scripted", "tokens": tokens})
        assert back.json() == {"prompt": text}


async def test_a_conversation_becomes_what_a_worker_would_get(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]
    asked: dict[str, Any] = {"messages": messages, "return_token_strs": True}
    reply = (await http.post("/tokenize", json=asked)).json()
    assert reply["tokens"] == [SYSTEM, 97, END, USER, 98, END, ASSISTANT]
    assert reply["token_strs"][:3] == ["<|system|>", "a", "<|end|>"]
    whole = await http.post("/detokenize", json={"tokens": reply["tokens"]})
    assert whole.json()["prompt"] == "<|system|>a<|end|><|user|>b<|end|><|assistant|>"
    closed = await http.post("/tokenize", json=asked | {"add_generation_prompt": False})
    assert closed.json()["tokens"] == reply["tokens"][:-1]
    assert not worker.requests, "no worker is asked"


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
    http: httpx.AsyncClient, path: str, fields: dict[str, Any], status: int
) -> None:
    reply = await http.post(path, content=json.dumps(fields))
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_whoever_may_ask_for_text_may_ask_for_tokens() -> None:
    assert role_for("/tokenize") is role_for("/detokenize") is Role.CLIENT
