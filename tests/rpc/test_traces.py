"""Traces over the wire: a frontend and a real node send the spans of one request to a collector.

Reaches `kvstore.rpc.trace_interceptor` and `kvworkers.frontends.running`.
"""

import asyncio
from pathlib import Path

import httpx
from kvworkers.frontends.server import FrontendConfig, serving

from kvstore.client import AsyncClient
from kvstore.core.names import chain, pack_tokens
from kvstore.observe.tracing import under
from kvstore.router.members import Member
from kvstore.testing.node import start_node
from tests.byte_tokenizer import make_byte_tokenizer
from tests.collector import collector
from tests.patience import PATIENCE_S, PATIENT, until
from tests.scripted_worker import ScriptedWorker
from tests.session_process import PAYLOAD, namespace

TRACE = "ab" * 16
GIVEN = f"00-{TRACE}-{'cd' * 8}-01"


async def test_a_node_s_calls_belong_to_their_caller_s_trace() -> None:
    with collector() as kept, start_node(options=["--trace", kept.address]) as node:
        client = await AsyncClient.connect(
            node.run_dir, namespace=namespace("traced"), payload_bytes=PAYLOAD, shares=2,
            name="traced", config=PATIENT,
        )  # fmt: skip
        await client.stats()
        with under(GIVEN):
            await client.acquire(list(chain(client.root, pack_tokens([7] * 64))))
        await client.close()
        await until(lambda: bool(kept.spans))
    (span,) = kept.spans
    assert (span.service, span.name, span.trace) == ("kvstore-node", "Acquire", TRACE)
    assert span.parent == "cd" * 8 and span.ended_ns > span.began_ns and not span.failed


async def test_a_frontend_s_request_has_its_parts_beneath(tmp_path: Path) -> None:
    worker = ScriptedWorker("w", reply=list(b"Hello"))
    await worker.start()
    model = make_byte_tokenizer(tmp_path)
    with collector() as kept:
        async with serving(FrontendConfig(model=model, trace=kept.address)) as server:
            await server.set_members([Member("worker", "w", worker.address)])
            await until(server.ready)
            url = f"http://{server.http_address}"
            body = {"messages": [{"role": "user", "content": "Hi"}], "model": ""}
            async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S) as http:
                headers = {"traceparent": GIVEN}
                reply = await http.post("/v1/chat/completions", json=body, headers=headers)
                assert reply.status_code == 200
                await http.post("/v1/chat/completions", json=body, headers={"traceparent": "junk"})
    await asyncio.wait_for(worker.stop(), PATIENCE_S)
    request, other = kept.named("request")
    assert (request.trace, request.parent) == (TRACE, "cd" * 8)
    assert other.trace != TRACE and other.parent == ""
    assert request.values["kvstore.outcome"] == "stop"
    assert request.values["kvstore.output_tokens"] == 5
    for name in ("route", "attempt"):
        span = next(span for span in kept.named(name) if span.trace == TRACE)
        assert span.parent == request.span and span.values["kvstore.worker"] == "w"
        assert request.began_ns <= span.began_ns <= span.ended_ns <= request.ended_ns
