"""`kvstore chat` against a small server of ours that speaks the same events, and misbehaves."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click.testing
import pytest
from kvworkers.commands.chat import chat
from kvworkers.frontends.server import FrontendConfig, serving

from kvstore.router.members import Member
from tests.byte_tokenizer import make_byte_tokenizer
from tests.patience import PATIENCE_S
from tests.scripted_worker import ScriptedWorker
from tests.security_fixture import TOKENS, secured


class Frontend(BaseHTTPRequestHandler):
    asked: list[dict[str, Any]]

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        question = body["messages"][-1]["content"]
        if question == "refuse":
            self._send(429, {"error": {"message": "queue is full"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        events: list[Any] = [{"choices": [{"delta": {"content": w}}]} for w in ("Good ", "day.")]
        if question == "break":
            events.append({"error": {"message": "the worker is gone"}})
        usage = {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 32}}
        ours = {"cached_tokens": {"hbm": 16, "dram": 16}, "ttft_ms": 12.3, "worker": "worker-1"}
        events.append({"choices": [], "usage": usage, "kvstore": ours})
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    handler = type("Handler", (Frontend,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", asked
        http.shutdown()
        thread.join()


def talk(url: str, typed: str, *options: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(
        chat, ["--url", url, *options], input=typed, standalone_mode=False
    )


def test_turns_keep_the_conversation_and_show_the_account(
    server: tuple[str, list[dict[str, Any]]],
) -> None:
    url, asked = server
    done = talk(url, "Hello\n\nAgain\n/quit\nnever\n", "--system", "Be kind.", "--max-tokens", "9")
    assert done.exception is None and done.return_value == 0
    assert done.stdout == "Good day.\nGood day.\n"
    account = (
        "  32 of 40 prompt tokens cached (16 hbm, 16 dram) · first token after 12 ms · worker-1"
    )
    assert done.stderr.splitlines() == [account, account]
    assert [m["content"] for m in asked[1]["messages"]] == [
        "Be kind.", "Hello", "Good day.", "Again",
    ]  # fmt: skip
    assert asked[0]["model"] == "tiny" and asked[0]["max_tokens"] == 9 and asked[0]["stream"]


@pytest.mark.parametrize(
    ("question", "message"), [("refuse", "queue is full"), ("break", "the worker is gone")]
)
def test_a_failed_turn_is_one_line_and_does_not_end_the_talk(
    server: tuple[str, list[dict[str, Any]]], question: str, message: str
) -> None:
    url, asked = server
    done = talk(url, f"{question}\nHello\n")
    assert done.return_value == 1
    assert f"kvstore: {message}" in done.stderr
    assert [m["content"] for m in asked[1]["messages"]] == ["Hello"], "the failed turn is not kept"
    assert done.stdout.endswith("Good day.\n")


def test_a_url_that_is_none_or_answers_nothing_is_named() -> None:
    assert "--url" in str(talk("localhost", "Hello\n").exception)
    assert "127.0.0.1:9" in str(talk("http://127.0.0.1:9", "Hello\n").exception)


async def test_a_cluster_over_tls_is_talked_to_with_a_token(tmp_path: Path) -> None:
    rules = secured(tmp_path)
    (tmp_path / "team-a.token").write_text(TOKENS["team-a"])
    mine = tmp_path / "team-a.toml"
    text = rules.file.read_text().replace("cluster.token", "team-a.token")
    mine.write_text('server_name = "server"\n' + text)
    nameless, strange = tmp_path / "nameless.toml", tmp_path / "strange.toml"
    nameless.write_text(f'ca = "{rules.ca}"\n')
    strange.write_text('server_name = "elsewhere.example"\n' + text)
    worker = ScriptedWorker("w", reply=list(b"Good day."), security=rules.config)
    await worker.start()
    config = FrontendConfig(model=make_byte_tokenizer(tmp_path / "model"), security=rules.file)
    async with serving(config) as server:
        await server.set_members([Member("worker", "w", worker.address)])
        url = f"https://{server.http_address}"

        async def said(security: Path) -> click.testing.Result:
            return await asyncio.to_thread(talk, url, "Hello\n", "--security", str(security))

        async with asyncio.timeout(PATIENCE_S):
            while not server.ready():  # noqa: ASYNC110 - the view tells nobody
                await asyncio.sleep(0.01)
        done = await said(mine)
        assert done.exception is None and done.stdout == "Good day.\n"
        assert "say --security" in str((await said(nameless)).exception)
        assert "elsewhere.example" in str((await said(strange)).exception)
    await worker.stop()
