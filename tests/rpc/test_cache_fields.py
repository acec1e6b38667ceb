"""What a request says of the cache, and what several replies share, through HTTP and gRPC.

A real worker, whose own counters say what was computed.
"""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from kvstore.rpc.channel import open_channel
from kvstore.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from tests.served_fixture import Served
from tests.served_fixture import served as served

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENS = 320
HITS = TOKENS - 16
"""Of a prompt of whole blocks the last one is computed, for logits to sample from."""


def prompt_of(test: str) -> str:
    """Return a prompt of `TOKENS` tokens that no other test has."""
    return (f"{test} " + "The keeper walks round the lamp. " * 20)[:TOKENS]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stub(served: Served) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    async with open_channel(served.frontend.grpc_address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def cached(reply: Any) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
async def test_several_replies_compute_their_prompt_once(
    served: Served, path: str, stream: bool
) -> None:
    prompt = prompt_of(f"{stream} {path}")
    asked: dict[str, Any] = {"max_tokens": 24, "seed": 5, "temperature": 1.0}
    asked |= (
        {"prompt": prompt}
        if path == "/v1/completions"
        else {"messages": [{"role": "user", "content": prompt}]}
    )
    computed, from_pages = served.prompt_tokens("computed"), served.prompt_tokens("hbm")
    if stream:
        reply = await served.http.post(
            path, json=asked | {"model": served.model, "n": 4, "stream": True}
        )
        assert reply.text.endswith("data: [DONE]\n\n")
        length = TOKENS + 3 * (path != "/v1/completions")
    else:
        whole = await served.ask(path, **asked, n=4)
        length = whole["usage"]["prompt_tokens"]
        assert cached(whole) == 0, "what its own other replies found is no hit of the prompt"
        ours = [choice["kvstore"]["cached_tokens"]["hbm"] for choice in whole["choices"]]
        assert sorted(ours) == [0, length, length, length], "the others compute nothing"
        alone = [await served.ask(path, **asked | {"seed": 5 + at}) for at in range(4)]
        texts = [choice.get("text") or choice["message"] for choice in whole["choices"]]
        found = [one["choices"][0] for one in alone]
        assert texts == [choice.get("text") or choice["message"] for choice in found]
        assert len({str(text) for text in texts}) == 4, "each has a seed of its own"
    hits = (length - 1) // 16 * 16
    again = 0 if stream else 4
    assert served.prompt_tokens("computed") - computed == length + again * (length - hits)
    assert served.prompt_tokens("hbm") - from_pages == 3 * length + again * hits


async def test_a_request_without_tokens_brings_its_prompt_into_the_cache(
    served: Served, stub: inference_pb2_grpc.InferenceStub
) -> None:
    for wire in ("completion", "chat", "stream", "grpc"):
        prompt = prompt_of(f"warm {wire}")
        if wire == "completion":
            reply = await served.ask(prompt=prompt, max_tokens=0, echo=True, logprobs=None)
            assert reply["choices"][0]["text"] == prompt
            assert reply["choices"][0]["finish_reason"] == "length"
            assert reply["usage"]["completion_tokens"] == 0
            assert reply["kvstore"]["computed_tokens"] == TOKENS
        elif wire == "chat":
            reply = await served.ask(
                "/v1/chat/completions", messages=[{"role": "user", "content": prompt}],
                max_tokens=0, logprobs=True,
            )  # fmt: skip
            choice = reply["choices"][0]
            assert (choice["message"]["content"], choice["logprobs"]) == ("", None)
        elif wire == "stream":
            asked = {"model": served.model, "prompt": prompt, "max_tokens": 0, "stream": True}
            said = (await served.http.post("/v1/completions", json=asked)).text
            assert said.count("data: ") == 2 and '"finish_reason": "length"' in said
        else:
            request = inference_pb2.GenerateRequest(text=prompt, prefill_only=True)
            replies = [reply async for reply in stub.Generate(request)]
            assert [(one.text, one.tokens, one.finish_reason) for one in replies] == [
                ("", b"", "length")
            ]
            assert replies[0].cache.computed_tokens == TOKENS
        if wire != "chat":
            assert cached(await served.ask(prompt=prompt, max_tokens=1)) == HITS


async def test_what_a_request_says_of_the_cache_holds_over_http(served: Served) -> None:
    plain = {"max_tokens": 1}
    for path in ("/v1/completions", "/v1/chat/completions"):
        prompt = prompt_of(f"fields {path}")
        asked: dict[str, Any] = (
            {"prompt": prompt}
            if path == "/v1/completions"
            else {"messages": [{"role": "user", "content": prompt}]}
        )

        async def hits(path: str = path, asked: Any = asked, **options: Any) -> int:
            return cached(await served.ask(path, **plain, **asked, kvstore=options))

        assert await hits(no_store=True) == 0
        assert await hits(no_store=True) == 0, "nothing was kept"
        assert await hits() == 0
        assert await hits() >= HITS
        assert await hits(no_read=True) == 0, "what is there is not used"
        assert await hits(cache_salt="a") == 0, "a salt has names of its own"
        assert await hits(cache_salt="a") >= HITS
        assert await hits(cache_salt="b") == 0
        # vLLM's place for it, which must not be ignored: who sends it wants to be kept apart.
        beside = await served.ask(path, **plain, **asked, cache_salt="a")
        assert cached(beside) >= HITS
        assert cached(await served.ask(path, **plain, **asked, cache_salt="c")) == 0


async def test_what_a_request_says_of_the_cache_holds_over_grpc(
    stub: inference_pb2_grpc.InferenceStub,
) -> None:
    async def hits(**options: Any) -> int:
        request = inference_pb2.GenerateRequest(
            text=prompt_of("grpc"), sampling=worker_pb2.Sampling(max_tokens=1), **options
        )
        replies = [reply async for reply in stub.Generate(request)]
        return int(replies[0].cache.hbm_tokens)

    assert [await hits(no_store=True), await hits(no_store=True)] == [0, 0]
    assert [await hits(), await hits()] == [0, HITS]
    assert await hits(no_read=True) == 0
    assert [await hits(cache_salt="a"), await hits(cache_salt="a")] == [0, HITS]


async def test_the_caches_fields_are_checked(served: Served) -> None:
    for options in ({"no_store": "perhaps"}, {"nostore": True}, {"cache_salt": "x" * 5_000}):
        asked = {"model": served.model, "prompt": "a", "kvstore": options}
        reply = await served.http.post("/v1/completions", json=asked)
        assert reply.status_code == 400, reply.text
    asked = {"model": served.model, "prompt": "a", "kvstore": {"cache_salt": "a"}}
    reply = await served.http.post("/v1/completions", json=asked | {"cache_salt": "b"})
    assert reply.json()["error"]["param"] == "cache_salt"
