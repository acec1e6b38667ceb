"""A real worker with a tiny model, and a real frontend over it, shared by the tests of a module."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest_asyncio
from kvworkers.frontends.server import FrontendConfig, FrontendServer, serving
from kvworkers.worker import WorkerServer
from kvworkers.worker_config import WorkerConfig

from kvstore.router.members import Member
from tests.frontend_fixture import eventually
from tests.patience import PATIENCE_S
from tests.text_model import text_model


@dataclass
class Served:
    """What the tests talk to."""

    worker: WorkerServer
    frontend: FrontendServer
    http: httpx.AsyncClient
    client: openai.AsyncOpenAI
    model: str

    def prompt_tokens(self, source: str) -> float:
        """Return the engine's own count of prompt tokens by where they came from."""
        name = "kvstore_worker_prompt_tokens_total"
        return self.worker.registry.get_sample_value(name, {"source": source}) or 0.0

    async def ask(self, path: str = "/v1/completions", **fields: Any) -> Any:
        """Return the parsed reply to a request that has to succeed."""
        reply = await self.http.post(path, json={"model": self.model, **fields})
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def chat(self, **fields: Any) -> Any:
        """Return what the openai client makes of a reply, or of a stream."""
        asked: dict[str, Any] = {"model": self.model, **fields}
        return await self.client.chat.completions.create(**asked)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[Served]:
    model = text_model()
    worker = WorkerServer(WorkerConfig(model=str(model), pool_bytes=4 << 20, threads=1, drain_ms=0))
    await worker.start()
    async with serving(FrontendConfig(model=model)) as frontend:
        await frontend.set_members([Member("worker", "worker-0", worker.address)])
        await eventually(frontend.ready, "the worker is ready")
        url = f"http://{frontend.http_address}"
        async with (
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S) as http,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
        ):
            yield Served(worker, frontend, http, client, worker.model_name)
    await worker.stop()
