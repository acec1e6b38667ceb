"""The endpoint picker behind a real Envoy: engines are HTTP servers that publish vLLM's events.

Needs the `envoy` binary (`make test-engines` installs one; or KVSTORE_ENVOY); skipped without.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvstore.adapters.envoy.picker import PickerConfig
from kvstore.adapters.envoy.server import ExtProcServer
from kvstore.observe.metrics import exposition
from kvstore.router.members import Members, parse_vllm
from kvstore.router.router import RouterConfig
from kvstore.router.server import RouterServer
from tests.engines.envoy_process import BINARY, envoy
from tests.patience import until
from tests.scripted_vllm import ScriptedVllm, stored
from tests.scripted_worker import ROOT

pytestmark = [
    pytest.mark.skipif(not BINARY, reason="no Envoy: set KVSTORE_ENVOY"),
    pytest.mark.timeout(120),
]
SYSTEM = "You are the librarian of a cache. " * 8


class ByteTokens:
    def text(self, text: str) -> Sequence[int]:
        return list(text.encode())

    def conversation(self, turns: Sequence[Any], options: Any) -> Sequence[int]:
        return self.text("".join(turn["content"] for turn in turns))


class Engine:
    """An HTTP server that answers as vLLM does, and says what it got."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.events = ScriptedVllm()
        self.bodies: list[bytes] = []
        self.status = 200

    async def start(self) -> None:
        await self.events.start()
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        await self.events.stop()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        body = bytearray()
        if "chunked" in head:
            while size := int((await reader.readline()).split(b";")[0], 16):
                body += await reader.readexactly(size + 2)
                del body[-2:]
            await reader.readline()
        elif "content-length: " in head:
            body += await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
        self.bodies.append(bytes(body))
        usage = {"prompt_tokens_details": {"cached_tokens": 64}}
        last = json.dumps({"by": self.name, "usage": usage})
        answer = f'data: {{"text": "hi"}}\n\ndata: {last}\n\ndata: [DONE]\n\n'.encode()
        writer.write(
            f"HTTP/1.1 {self.status} X\r\ncontent-type: text/event-stream\r\nconnection: close\r\n"
            f"content-length: {len(answer)}\r\n\r\n".encode()
            + answer
        )
        await writer.drain()
        writer.close()


class Front:
    """Two engines, a router with a picker, and Envoy before them."""

    def __init__(self, engines: list[Engine], beside: RouterServer, url: str) -> None:
        self.engines, self.beside, self.url = engines, beside, url
        self.http = httpx.AsyncClient(trust_env=False, timeout=30)

    async def ask(self, text: str) -> httpx.Response:
        body = {"model": "m", "prompt": text, "stream": True}
        return await self.http.post(f"{self.url}/v1/completions", json=body)

    def metric(self, line: str) -> float:
        rows = exposition(self.beside.registry)().decode().splitlines()
        found = [row.rpartition(" ")[2] for row in rows if row.startswith(line + " ")]
        return float(found[0]) if found else 0.0


@asynccontextmanager
async def front(directory: Path, body_mode: str) -> AsyncIterator[Front]:
    engines = [Engine("a"), Engine("b")]
    for engine in engines:
        await engine.start()
    found = [
        parse_vllm(f"{one.name}={one.address},{one.events.endpoint},{one.events.replay}", ROOT)
        for one in engines
    ]
    config = RouterConfig(events_vllm={member.name: events for member, events in found})
    beside = RouterServer(Members.of(member for member, _ in found), config=config)
    picker = ExtProcServer(beside, PickerConfig(root=ROOT), ByteTokens())
    await beside.start("127.0.0.1:0")
    await picker.start("127.0.0.1:0")
    try:
        await until(lambda: all(beside.router.health(name) == "live" for name in "ab"))
        with envoy(directory, picker.address, body_mode) as url:
            made = Front(engines, beside, url)
            async with made.http:
                await until(lambda: _up(made), seconds=30)
                yield made
    finally:
        await picker.stop()
        await beside.stop()
        for engine in engines:
            await engine.stop()


async def _up(front: Front) -> bool:
    try:
        await front.http.get(f"{front.url}/v1/models")
    except httpx.TransportError:
        return False
    return True


@pytest.mark.parametrize("body_mode", ["FULL_DUPLEX_STREAMED", "BUFFERED"])
async def test_envoy_sends_prompts_where_their_prefix_is(tmp_path: Path, body_mode: str) -> None:
    async with front(tmp_path, body_mode) as made:
        for holder in made.engines:
            text = f"{holder.name}: {SYSTEM}"
            await holder.events.publish(stored(list(text.encode()), size=16))
        await until(lambda: made.beside.router.view_blocks >= 2 * (len(SYSTEM) // 16))
        for holder in (*made.engines, *reversed(made.engines)):
            text = f"{holder.name}: {SYSTEM}" + "long " * 40_000
            answer = await made.ask(text)
            assert answer.status_code == 200
            assert f'"by": "{holder.name}"' in answer.text and "[DONE]" in answer.text
            assert json.loads(holder.bodies[-1])["prompt"] == text
        learnt = 'kvstore_routed_hit_tokens_total{kind="actual"}'
        await until(lambda: made.metric(learnt) == 4 * 64)
        assert made.metric("kvstore_actual_ttft_seconds_count") == 4


async def test_envoy_passes_on_why_nobody_answers(tmp_path: Path) -> None:
    async with front(tmp_path, "FULL_DUPLEX_STREAMED") as made:
        made.engines[0].status = made.engines[1].status = 500
        for _ in range(2):  # each fails once, and is then left alone for a moment
            assert (await made.ask("x")).status_code == 500
        refused = await made.ask("x")
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert "no worker is alive" in refused.text
        made.engines[0].status = 200
        await until(lambda: _answers(made))
        too_large = await made.ask("y" * (5 << 20))
        assert too_large.status_code == 413


async def _answers(made: Front) -> bool:
    return (await made.ask("x")).status_code == 200


async def test_what_a_pick_costs(tmp_path: Path) -> None:
    """Print what Envoy with the picker takes over the engine by itself; no bound: two cores."""
    prompt = SYSTEM * 30
    async with front(tmp_path, "FULL_DUPLEX_STREAMED") as made:
        engine = f"http://{made.engines[0].address}"
        times: dict[str, list[float]] = {"direct": [], "picked": []}
        body = {"model": "m", "prompt": prompt, "stream": True}
        for _ in range(60):
            for name, url in (("direct", engine), ("picked", made.url)):
                answer = await made.http.post(f"{url}/v1/completions", json=body)
                assert answer.status_code == 200
                times[name].append(answer.elapsed.total_seconds() * 1e3)
        medians = {name: round(sorted(all_)[len(all_) // 2], 2) for name, all_ in times.items()}
        sys.stdout.write(f"\nmedian ms of 60, {len(prompt)} tokens: {json.dumps(medians)}\n")
        assert made.metric('kvstore_picks_total{outcome="picked"}') >= 60
