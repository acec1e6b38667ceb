"""A frontend over one scripted worker, with the clients that talk to it.

Each test has its own; those that leave everything as it was share one by the fixture `shared`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import pytest_asyncio
from kvworkers.frontends.server import FrontendConfig, FrontendServer, serving

from kvstore.router.members import Member
from tests.byte_tokenizer import make_byte_tokenizer
from tests.patience import PATIENCE_S
from tests.scripted_worker import ScriptedWorker

TEXT = "Grüße, 🌍! Ende"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_tokenizer(tmp_path_factory.mktemp("byte-tokenizer"))


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker("w", reply=list(TEXT.encode()))
    await worker.start()
    yield worker
    await worker.stop()


@pytest.fixture
async def frontend(model: Path, worker: ScriptedWorker) -> AsyncIterator[FrontendServer]:
    async with serving(FrontendConfig(model=model, max_body_bytes=64 << 10)) as server:
        await server.set_members([Member("worker", "w", worker.address)])
        await eventually(server.ready, "the worker is ready")
        yield server


@pytest.fixture
async def client(frontend: FrontendServer) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://{frontend.http_address}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(frontend: FrontendServer) -> AsyncIterator[httpx.AsyncClient]:
    url = f"http://{frontend.http_address}"
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S) as http:
        yield http


@dataclass
class Shared:
    """What the tests of a module talk to, one after the other. They run on the module's loop."""

    worker: ScriptedWorker
    frontend: FrontendServer
    http: httpx.AsyncClient
    client: openai.AsyncOpenAI


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(model: Path) -> AsyncIterator[Shared]:
    worker = ScriptedWorker("w", reply=list(TEXT.encode()))
    await worker.start()
    async with serving(FrontendConfig(model=model, max_body_bytes=64 << 10)) as server:
        await server.set_members([Member("worker", "w", worker.address)])
        await eventually(server.ready, "the worker is ready")
        url = f"http://{server.http_address}"
        async with (
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S) as http,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
        ):
            yield Shared(worker, server, http, client)
    await worker.stop()


async def eventually(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - set by another process or task
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"never: {what}")
