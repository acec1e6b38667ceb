"""A frontend that has to go: what runs ends, what is new is sent elsewhere, health says so."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kvworkers.frontends.door import RETRY_AFTER_MS, Door, Draining
from kvworkers.frontends.server import FrontendConfig, FrontendServer, serving
from prometheus_client import CollectorRegistry

from kvstore.core.errors import Refused
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.members import Member
from kvstore.rpc.channel import open_channel
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from tests.byte_tokenizer import make_byte_tokenizer
from tests.patience import PATIENCE_S
from tests.processes import Started, started
from tests.scripted_worker import Faults, ScriptedWorker

TEXT = "abcdefghijklmnopqrstuvwxyz"
BODY = {
    "model": "scripted", "messages": [{"role": "user", "content": "hi"}], "stream": True,
    "max_tokens": 100,
}  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_tokenizer(tmp_path_factory.mktemp("byte-tokenizer"))


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker("w", reply=list(TEXT.encode()), step_s=0.02)
    await worker.start()
    yield worker
    await worker.stop()


@pytest.fixture
async def frontend(model: Path, worker: ScriptedWorker) -> AsyncIterator[FrontendServer]:
    async with serving(FrontendConfig(model=model, drain_ms=0)) as server:
        await server.set_members([Member("worker", "w", worker.address)])
        async with asyncio.timeout(PATIENCE_S):
            while not server.ready():  # noqa: ASYNC110 - the view tells nobody
                await asyncio.sleep(0.01)
        yield server


@asynccontextmanager
async def stream(http: httpx.AsyncClient) -> AsyncIterator[AsyncIterator[str]]:
    """Begin a stream; yields its lines behind the first one."""
    async with http.stream("POST", "/v1/chat/completions", json=BODY) as reply:
        assert reply.status_code == 200
        lines = reply.aiter_lines()
        assert (await anext(lines)).startswith("data: {")
        yield lines


def client(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{address}", trust_env=False, timeout=PATIENCE_S)


async def draining(frontend: FrontendServer, http: httpx.AsyncClient) -> "asyncio.Task[bool]":
    """Begin to drain, for ten seconds at most; returns when health says so."""
    task = asyncio.create_task(frontend.drain(drain_ms=10_000))
    await unhealthy(http)
    return task


async def unhealthy(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await http.get("/health")).status_code == 200:
            pass


async def test_what_runs_ends_whole_and_what_is_new_is_sent_away(
    frontend: FrontendServer,
) -> None:
    async with client(frontend.http_address) as http, stream(http) as lines:
        ending = await draining(frontend, http)
        health = await http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        refused = await http.post("/v1/chat/completions", json=BODY)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == str(RETRY_AFTER_MS // 1_000)
        assert refused.headers["connection"] == "close"
        assert refused.json()["error"]["type"] == "service_unavailable"
        assert "ask another one" in refused.json()["error"]["message"]
        assert not ending.done()
        assert [line async for line in lines if line][-1] == "data: [DONE]"
        assert await ending
        counted = (await http.get("/metrics")).text
        assert 'kvstore_requests_total{outcome="Draining"} 1.0' in counted
        assert 'kvstore_requests_total{outcome="stop"} 1.0' in counted


async def test_a_grpc_caller_is_told_the_same(frontend: FrontendServer) -> None:
    async with (
        client(frontend.http_address) as http,
        open_channel(frontend.grpc_address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.GenerateRequest(
            text="hi", sampling=worker_pb2.Sampling(max_tokens=26)
        )
        running = stub.Generate(request)
        first = await anext(aiter(running))
        ending = await draining(frontend, http)
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            _ = [reply async for reply in stub.Generate(request)]
        error = error_from(failure.value)
        assert isinstance(error, Refused) and error.retry_after_ms == RETRY_AFTER_MS
        text = first.text + "".join([reply.text async for reply in running])
        assert text == TEXT
        assert await ending


async def test_the_deadline_bounds_it(frontend: FrontendServer, worker: ScriptedWorker) -> None:
    worker.faults = Faults(hang_after=3)
    async with client(frontend.http_address) as http, stream(http) as lines:
        assert not await frontend.drain(drain_ms=50)
        stopping = asyncio.create_task(frontend.stop(drain_ms=0))
        with pytest.raises(httpx.TransportError):
            _ = [line async for line in lines]
        async with asyncio.timeout(PATIENCE_S):
            await stopping


async def test_an_idle_one_drains_at_once(frontend: FrontendServer) -> None:
    async with asyncio.timeout(PATIENCE_S):
        assert await frontend.drain(drain_ms=60_000)


def process(model: Path, worker: ScriptedWorker, *options: str) -> list[str]:
    return ["-m", "kvworkers.frontends", "--json", "--model", str(model),
            "--worker", f"w={worker.address}", "--http", "127.0.0.1:0", *options]  # fmt: skip


async def ended(one: Started) -> int:
    return await asyncio.to_thread(one.process.wait, PATIENCE_S)


async def test_sigterm_drains_the_process(model: Path, worker: ScriptedWorker) -> None:
    with started(process(model, worker, "--drain-ms", "20000")) as one:
        async with client(one.ready["http"]) as http, stream(http) as lines:
            one.signal(signal.SIGTERM)
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        assert await ended(one) == 0


async def test_a_second_signal_does_not_wait(model: Path, worker: ScriptedWorker) -> None:
    worker.faults = Faults(hang_after=3)
    with started(process(model, worker, "--drain-ms", "60000")) as one:
        async with client(one.ready["http"]) as http, stream(http) as lines:
            one.signal(signal.SIGTERM)
            await unhealthy(http)
            one.signal(signal.SIGTERM)
            with pytest.raises(httpx.TransportError):
                _ = [line async for line in lines]
        assert await ended(one) == 0


async def test_a_closed_door_lets_out_but_not_in() -> None:
    door = Door(RouterMetrics(CollectorRegistry()))
    with door.inside():
        door.close()
        with pytest.raises(Draining), door.inside():
            pass
        assert not await door.emptied(0)
    assert await door.emptied(0)
