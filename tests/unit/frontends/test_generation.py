from array import array
from typing import Any

import pytest
from kvworkers.frontends.generation import (
    CacheAccount,
    Chunk,
    Generation,
    SamplingChoice,
    TokenChance,
)
from kvworkers.frontends.grpc_frontend import generation_of, reply_of
from kvworkers.frontends.messages import Message

from kvstore.core.errors import BadInput
from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.rpc.v1 import inference_pb2, types_pb2, worker_pb2


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": -1}, {"temperature": -0.1}, {"temperature": float("nan")},
        {"temperature": 2.1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": float("nan")},
        {"top_k": -1}, {"top_k": 1 << 32}, {"seed": 1 << 64}, {"logprobs": 21},
        {"stop_token_ids": (-1,)}, {"stop_token_ids": tuple(range(65))},
    ],
)  # fmt: skip
def test_bad_sampling_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(bad)).split("_")[0]):
        SamplingChoice(**bad)


@pytest.mark.parametrize(
    "bad",
    [
        {}, {"text": "a", "tokens": [1]}, {"text": ""}, {"tokens": []}, {"messages": []},
        {"messages": [Message("robot", "a")]}, {"text": "\ud800"},
        {"messages": [Message("user", "a\udfff")]}, {"text": "a", "stop": ("",)},
        {"text": "a", "stop": ("x",) * 17}, {"text": "a", "cache_salt": b"x" * 5000},
        {"text": "a", "deadline_ms": 700_000}, {"text": "a", "deadline_ms": -1},
        {"messages": [Message("user", "a")] * 4097},
    ],
)  # fmt: skip
def test_bad_requests_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Generation(request_id="r", **bad)


def test_negative_seeds_and_tiny_top_p_survive_the_wire() -> None:
    made = SamplingChoice(seed=-1, top_p=1e-60, temperature=0).to_proto(5)
    assert (made.seed, made.has_seed, made.max_tokens) == ((1 << 64) - 1, True, 5)
    assert made.top_p > 0


def test_the_account_survives_the_wire_and_shows_unknown_reasons_as_absent() -> None:
    report = types_pb2.CacheReport(
        prompt_tokens=100, hbm_tokens=16, dram_tokens=32, computed_tokens=52,
        miss_reason=types_pb2.MISS_REASON_COMPUTING, places="w, n",
    )  # fmt: skip
    account = CacheAccount.from_proto(report)
    assert account.cached_tokens == 48
    assert account.by_tier[TierKind.DRAM] == 32
    assert account.miss_reason is MissReason.COMPUTING
    assert account.to_proto() == report
    newer = types_pb2.CacheReport.FromString(b"\x40\x63")  # miss_reason = 99
    assert CacheAccount.from_proto(newer).miss_reason is MissReason.ABSENT


def test_a_grpc_request_is_read_with_its_defaults() -> None:
    request = inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenIds(packed=array("I", [1, 2]).tobytes()),
        sampling=worker_pb2.Sampling(seed=7, has_seed=True),
        cache_salt="salt",
    )
    made = generation_of(request)
    assert list(made.tokens or ()) == [1, 2]
    assert made.sampling == SamplingChoice(temperature=0.0, seed=7)
    assert made.cache_salt == b"salt"
    spoken = inference_pb2.GenerateRequest(
        messages=inference_pb2.Messages(messages=[inference_pb2.Message(role="user", content="a")])
    )
    assert generation_of(spoken).messages == [Message("user", "a")]


@pytest.mark.parametrize(
    "request_",
    [
        inference_pb2.GenerateRequest(),
        inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds(packed=b"abc")),
        inference_pb2.GenerateRequest(text="a", model="x" * 300),
        inference_pb2.GenerateRequest(
            tokens=inference_pb2.TokenIds(packed=bytes(4 * ((1 << 20) + 1)))
        ),
    ],
    ids=["nothing", "half a token", "long model", "too many tokens"],
)
def test_bad_grpc_requests_are_refused(request_: inference_pb2.GenerateRequest) -> None:
    with pytest.raises(BadInput):
        generation_of(request_)


def test_a_chunk_becomes_a_reply() -> None:
    chance = TokenChance(65, -0.5, ((65, -0.5), (66, -1.5)))
    reply = reply_of(Chunk(text="A", tokens=(65,), chances=(chance,), worker="w", output_tokens=1))
    assert (reply.text, reply.tokens, reply.worker) == ("A", b"A\0\0\0", "w")
    assert list(reply.logprobs[0].token_ids) == [65, 66]
    assert not reply.HasField("cache")
