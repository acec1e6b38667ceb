"""The console's answers over a scripted worker. tests/e2e/test_console_slow.py has the browser."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from kvworkers.frontends.console import is_loopback_address
from kvworkers.frontends.server import FrontendConfig, FrontendServer, serving

from kvstore.router.members import Member
from tests.byte_tokenizer import make_byte_tokenizer
from tests.patience import PATIENCE_S, until
from tests.scripted_worker import ScriptedWorker


@pytest.fixture
async def frontend(tmp_path: Path) -> AsyncIterator[FrontendServer]:
    worker = ScriptedWorker("w", reply=list(b"Hello"))
    await worker.start()
    async with serving(FrontendConfig(model=make_byte_tokenizer(tmp_path))) as server:
        await server.set_members([Member("worker", "w", worker.address, host="h")])
        await until(server.ready)
        yield server
    await worker.stop()


@pytest.fixture
async def http(frontend: FrontendServer) -> AsyncIterator[httpx.AsyncClient]:
    url = f"http://{frontend.http_address}"
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S) as http:
        yield http


async def ask(http: httpx.AsyncClient, text: str) -> None:
    body = {"model": "", "messages": [{"role": "user", "content": text}], "max_tokens": 5}
    reply = await http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text


async def state(http: httpx.AsyncClient) -> dict[str, Any]:
    reply = await http.get("/console/state")
    assert reply.status_code == 200
    found: dict[str, Any] = reply.json()
    return found


async def test_the_page_needs_nothing_from_elsewhere(http: httpx.AsyncClient) -> None:
    for path, kind in (("", "html"), ("/console.css", "css"), ("/console.js", "javascript")):
        reply = await http.get(f"/console{path}")
        assert reply.status_code == 200 and kind in reply.headers["content-type"]
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"
        text = reply.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "innerHTML" not in text


async def test_state_tells_of_members_requests_and_usage(http: httpx.AsyncClient) -> None:
    shared = "The same long beginning of several prompts. " * 20
    for end in ("one", "two", "three"):
        await ask(http, shared + end)
    told = await state(http)
    (member,) = told["members"]
    assert (member["name"], member["kind"], member["health"]) == ("w", "worker", "live")
    assert member["host"] and member["load"]["running"] == 0
    assert [one["outcome"] for one in told["requests"]] == ["stop"] * 3
    assert told["requests"][0]["began"] >= told["requests"][2]["began"]
    assert told["running"] == 0 and told["totals"]["ended"] == 3
    (domain,) = told["domains"]
    assert (domain["domain"], domain["requests"], domain["output_tokens"]) == ("default", 3, 15)
    assert told["hot"] and told["hot"][0]["tokens"] % 16 == 0
    assert len(told["hot"][0]["name"]) == 64
    assert "long beginning" not in str(told), "what prompts say is nobody's business"


async def test_a_request_is_explained(http: httpx.AsyncClient) -> None:
    await ask(http, "Why here?")
    request = (await state(http))["requests"][0]["id"]
    told = (await http.get(f"/console/requests/{request}")).json()
    assert told["worker"] == "w" and "not cached:" in told["explanation"]
    assert (await http.get("/console/requests/nobody")).status_code == 404


async def test_foreign_names_of_a_loopback_server_are_refused(
    http: httpx.AsyncClient, frontend: FrontendServer
) -> None:
    for path in ("/console", "/console/state", "/console/requests/x"):
        reply = await http.get(path, headers={"Host": "evil.example"})
        assert reply.status_code == 403, path
    port = frontend.http_address.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert (await http.get("/console/state", headers={"Host": host})).status_code == 200
    assert is_loopback_address("[::1]:80") and is_loopback_address("localhost:1")
    assert not is_loopback_address("0.0.0.0:80") and not is_loopback_address("10.0.0.1:80")


async def test_history_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kvworkers.frontends.console.STEP_S", 0.02)
    async with serving(FrontendConfig(model=make_byte_tokenizer(tmp_path))) as server:
        url = f"http://{server.http_address}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S) as http:

            async def two_steps() -> bool:
                return len((await state(http))["history"]["steps"]) >= 2

            await until(two_steps)


async def test_a_stopped_frontend_leaves_no_task(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with serving(FrontendConfig(model=make_byte_tokenizer(tmp_path))):
        assert any(task.get_name() == "console history" for task in asyncio.all_tasks())
    assert asyncio.all_tasks() == before
