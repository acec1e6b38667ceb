"""Asks a cluster for tokens over gRPC, as a frontend or straight at one worker."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from kvstore.core.names import pack_tokens
from kvstore.rpc.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    types_pb2,
    worker_pb2,
    worker_pb2_grpc,
)

SECONDS = 120.0


@dataclass(frozen=True)
class Said:
    """One reply: its tokens, and the account of the cache."""

    tokens: list[int]
    cache: types_pb2.CacheReport
    worker: str = ""
    retries: int = 0
    finish_reason: str = ""


def _put_together(replies: Sequence[Any]) -> Said:
    last = replies[-1]
    return Said(
        tokens=list(memoryview(b"".join(reply.tokens for reply in replies)).cast("I")),
        cache=next(reply.cache for reply in replies if reply.HasField("cache")),
        worker=getattr(last, "worker", ""),
        retries=getattr(last, "retries", 0),
        finish_reason=last.finish_reason,
    )


def generate(
    address: str,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    cache: bool = True,
    heard: Callable[[Any, int], None] = lambda reply, tokens: None,
) -> Said:
    """Ask a frontend; `heard` is told each piece and how many tokens there are so far."""
    request = inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenIds(packed=pack_tokens(prompt)),
        sampling=worker_pb2.Sampling(max_tokens=max_tokens),
        no_read=not cache,
        no_store=not cache,
    )
    replies = []
    tokens = 0
    with grpc.insecure_channel(address) as channel:
        for reply in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=SECONDS):
            replies.append(reply)
            tokens += len(reply.tokens) // 4
            heard(reply, tokens)
    return _put_together(replies)


def run_worker(address: str, prompt: Sequence[int], *, max_tokens: int) -> Said:
    """Ask one worker, whatever a router would have chosen."""
    request = worker_pb2.RunRequest(
        request_id="test",
        tokens=pack_tokens(prompt),
        sampling=worker_pb2.Sampling(max_tokens=max_tokens),
        share_domain="default",
    )
    with grpc.insecure_channel(address) as channel:
        return _put_together(
            list(worker_pb2_grpc.WorkerStub(channel).Run(request, timeout=SECONDS))
        )
