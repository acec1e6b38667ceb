"""Three raylets: deployed from YAML, scraped, and shot at while 200 streams run.

The cluster is joined over Ray's address and ordered about by the commands that operators type;
requests come from the `openai` client. Nothing may hang, fail or say a wrong token.
"""

import asyncio
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import httpx
import openai
import pytest

from tests.cluster_process import KVSTORE, MARK, command_line, eventually, marked_processes
from tests.exactness import Exactness, Reference
from tests.patience import PATIENCE_S
from tests.prometheus_queries import check_every_query, watching, work
from tests.raylets import Raylets, raylets
from tests.redis_process import RedisProcess, needs_redis, redis_process

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900), needs_redis]

STREAMS: Final = 200
"""At once, and as many again as it takes until every loss is made good."""
TOKENS: Final = 8
QUESTIONS: Final = (
    "Name a river in France.", "Name a lake in Italy.", "What is a cache?", "Who wrote Faust?",
    "What is two and two?", "Name a colour.", "What does a baker make?", "Name a planet.",
)  # fmt: skip
ATTEMPTS: Final = 4
"""Of one stream: one frontend is killed, and the other restarted, while it may be asked."""
HTTP: Final = 21_810
TRANSPORT_ERROR: Final[type[Exception]] = import_module(
    openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]
).TransportError
"""What a broken connection is to the `openai` client, whichever HTTP library it stands on."""

CONFIG = """
name: {name}
ray: {{address: "{address}"}}
drain_ms: 240000
events_redis: "{redis}"
workers: {{count: 3, pool: 128MiB, threads: 1}}
nodes: {{arena: 128MiB, nvme: "{nvme}", nvme_bytes: 1GiB}}
frontends: {{count: 2, http: "127.0.0.1:{http}", grpc: "127.0.0.1:{grpc}"}}
"""


@dataclass
class Deployed:
    """The cluster, and what its operator types."""

    name: str
    mark: str
    ray: Raylets
    redis: RedisProcess
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self, *words: str) -> str:
        done = subprocess.run(
            [*KVSTORE, *words, "--name", self.name], env=self.ray.environment,
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def status(self) -> dict[str, Any]:
        done = subprocess.run(
            [*KVSTORE, "status", "--json", "--name", self.name], env=self.ray.environment,
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"ready": False}
        return found

    def part(self, name: str) -> dict[str, Any]:
        """Return what is known of a part; nothing while the controller does not answer."""
        parts = self.status().get("parts", [])
        return next((part for part in parts if part["name"] == name), {})

    def replaced(self, name: str, pid: int) -> Callable[[], bool]:
        """Return what says whether another process is this part, and everything serves."""
        return lambda: self.part(name).get("pid", pid) != pid and bool(self.status()["ready"])

    def respawned(self, words: str, pid: int, count: int) -> Callable[[], bool]:
        """Return the same for one of `count` processes called so."""
        return lambda: (
            pid not in (now := self.pids(words))
            and len(now) == count
            and bool(self.status()["ready"])
        )

    def watched_instead(self) -> float:
        """Return how many members the first frontend follows directly for want of Redis."""
        text = httpx.get(f"http://127.0.0.1:{HTTP}/metrics", timeout=PATIENCE_S).text
        (line,) = re.findall(r"^kvstore_event_source_watched_instead (\S+)$", text, re.MULTILINE)
        return float(line)

    def pids(self, words: str) -> list[int]:
        return [pid for pid in marked_processes(self.mark) if words in command_line(pid)]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    mark, name = secrets.token_hex(8), f"test-{secrets.token_hex(4)}"
    directory = tmp_path_factory.mktemp("chaos")
    file, disk = directory / "cluster.yaml", directory / "nvme"
    with redis_process() as redis, raylets(3, mark={MARK: mark}) as ray:
        file.write_text(
            CONFIG.format(
                name=name, address=ray.address, http=HTTP, grpc=HTTP + 10, nvme=disk,
                redis=redis.url,
            )
        )  # fmt: skip
        up = subprocess.run(
            [*KVSTORE, "up", "--detach", "--json", "--config", str(file)], env=ray.environment,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert up.returncode == 0, up.stderr
        made = Deployed(name, mark, ray, redis, json.loads(up.stdout))
        try:
            yield made
        finally:
            made.run("down")
            Path(made.facts["log"]).unlink()
    left = {pid: command_line(pid) for pid in marked_processes(mark)}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_it_is_deployed_from_the_file_on_three_hosts(deployed: Deployed) -> None:
    status = deployed.status()
    assert status["ready"]
    hosts = {p["host"] for p in status["parts"] if p["role"] == "worker"}
    assert hosts == {"node-0", "node-1", "node-2"}, "one worker per host"
    for part in status["parts"]:
        address = part["metrics"] or part["http"]
        text = httpx.get(f"http://{address}/metrics", timeout=PATIENCE_S).text
        assert "kvstore_" in text, part["name"]


def test_prometheus_scrapes_it_and_every_query_returns_data(
    deployed: Deployed, tmp_path: Path
) -> None:
    """Three nodes, three workers, two frontends and the controller."""
    http, model = str(deployed.facts["http"]), str(deployed.facts["model"])
    with watching(deployed.name, tmp_path) as address:
        check_every_query(address, parts=9, load=lambda: work(http, model))


class Streams:
    """200 conversations with the `openai` client, and what became of each."""

    def __init__(self, deployed: Deployed) -> None:
        urls = [f"http://127.0.0.1:{HTTP + index}/v1" for index in range(2)]
        self._clients = [
            openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=280)
            for url in urls
        ]
        self._model = deployed.facts["model"]
        self._slots = asyncio.Semaphore(STREAMS)
        self.said: list[tuple[str, str]] = []
        self.broken = 0
        """Streams that ended before their end: their frontend was killed."""
        self.turned_away = 0
        """Connections refused while it was away, and requests while it drained."""
        self.later = 0
        """Asked to come later: every worker had enough to do, or was too busy to be heard."""

    def __str__(self) -> str:
        return (
            f"{len(self.said)} streams, {self.broken} of them asked again when their frontend was"
            f" killed, {self.turned_away} turned away while it was gone, {self.later} told when to"
            " come again"
        )

    async def all(self, enough: asyncio.Event) -> None:
        """Keep `STREAMS` running until `enough` is set, and let those finish."""
        number = 0
        async with asyncio.TaskGroup() as group:
            while number < STREAMS or not enough.is_set():
                await self._slots.acquire()
                group.create_task(self._one(number))
                number += 1
        for client in self._clients:
            await client.close()

    async def _one(self, number: int) -> None:
        question = QUESTIONS[number % len(QUESTIONS)]
        try:
            self.said.append((question, await self._ask(question, number)))
        finally:
            self._slots.release()

    async def _ask(self, question: str, number: int) -> str:
        """Ask one frontend; where that very process is gone, ask the other as a client would."""
        attempt = 0
        while attempt < ATTEMPTS:
            client, began = self._clients[(number + attempt) % 2], asyncio.Event()
            try:
                return await self._stream(client, question, began)
            except openai.RateLimitError as error:
                self.later += 1
                assert self.later < STREAMS, "refusals are the exception"
                await asyncio.sleep(float(error.response.headers["retry-after"]))
            except (
                openai.APIConnectionError,
                openai.InternalServerError,
                TRANSPORT_ERROR,
            ):
                attempt += 1
                if began.is_set():
                    self.broken += 1
                else:
                    self.turned_away += 1
        pytest.fail(f"no frontend took stream {number}")

    async def _stream(self, client: openai.AsyncOpenAI, question: str, began: asyncio.Event) -> str:
        stream = await client.chat.completions.create(
            model=self._model, messages=[{"role": "user", "content": question}],
            max_tokens=TOKENS, temperature=0, stream=True,
        )  # fmt: skip
        began.set()
        text, ended = "", ""
        async for event in stream:
            for choice in event.choices:
                text += choice.delta.content or ""
                ended = choice.finish_reason or ended
        if not ended:
            raise TRANSPORT_ERROR("the stream broke before its end")
        return text


async def test_two_hundred_streams_survive_every_loss(
    deployed: Deployed, reference: Reference, exactness: Exactness,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    streams = Streams(deployed)
    enough = asyncio.Event()
    running = asyncio.create_task(streams.all(enough))
    recovery: dict[str, float] = {}

    async def loses(what: str, pid: int, good_again: Callable[[], bool]) -> None:
        assert not running.done(), "there is load all the way"
        begun = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(eventually, good_again, seconds=180, what=f"{what} is back")
        recovery[what] = round(time.monotonic() - begun, 1)

    try:
        for what, name in (("a worker", "worker-0"), ("a router and its frontend", "frontend-1")):
            pid = int((await asyncio.to_thread(deployed.part, name))["pid"])
            await loses(what, pid, deployed.replaced(name, pid))
        for what, words in (
            ("a cache node", "kvstore.service.node"), ("a keeper", "kvstore.cli.main node"),
        ):  # fmt: skip
            pids = deployed.pids(words)
            await loses(what, pids[0], deployed.respawned(words, pids[0], len(pids)))
        broken, begun = streams.broken, time.monotonic()
        await lose_redis(deployed)
        recovery["Redis, gone and back"] = round(time.monotonic() - begun, 1)
        assert streams.broken == broken, f"no stream stands on Redis; {recovery}"
        begun = time.monotonic()
        await asyncio.to_thread(deployed.run, "restart", "frontend-0")
        recovery["a frontend restarted by order"] = round(time.monotonic() - begun, 1)
        assert streams.broken == broken, f"its streams ended whole; {recovery}"
        begun = time.monotonic()
        host = (await asyncio.to_thread(deployed.part, "worker-2"))["host"]
        await asyncio.to_thread(deployed.run, "drain", host)
        recovery["a drained host"] = round(time.monotonic() - begun, 1)
        enough.set()
        async with asyncio.timeout(500):
            await running
    finally:
        running.cancel()
    with capsys.disabled():
        sys.stderr.write(f"\n{streams}; recovery seconds: {json.dumps(recovery)}\n")
    assert len(streams.said) >= STREAMS
    assert streams.broken <= STREAMS, "only streams of the killed frontend break"
    compare(streams, reference, exactness)


async def lose_redis(deployed: Deployed) -> None:
    """Kill it, see members watched instead, start it empty, and see it used again."""
    deployed.redis.kill()
    await asyncio.to_thread(
        eventually, lambda: deployed.watched_instead() > 0, seconds=60,
        what="members are watched without Redis",
    )  # fmt: skip
    deployed.redis.start()
    await asyncio.to_thread(
        eventually, lambda: deployed.watched_instead() == 0, seconds=60, what="Redis is used",
    )  # fmt: skip


def compare(streams: Streams, reference: Reference, exactness: Exactness) -> None:
    """Fail where a reply is not the reference's, token by token."""
    for question, text in streams.said:
        prompt = reference.chat(("user", question))
        expected = reference.reply(prompt, TOKENS)
        said = reference.tokenizer(text, add_special_tokens=False)["input_ids"]
        wanted = reference.tokenizer.decode(expected, skip_special_tokens=True)
        exactness.check(question, prompt, expected, expected if text == wanted else said)


def test_a_host_that_dies_is_let_go_and_a_new_one_is_taken_in(deployed: Deployed) -> None:
    before = {p["name"] for p in deployed.status()["parts"] if p["role"] == "node"}
    deployed.ray.order("add")
    eventually(
        lambda: {p["name"] for p in deployed.status().get("parts", []) if p["role"] == "node"}
        > before,
        what="the new host gets a cache node",
    )  # fmt: skip
    deployed.run("scale", "3")
    eventually(lambda: deployed.status()["ready"], what="three workers serve")
    deployed.ray.order("kill 3")
    eventually(
        lambda: (
            {p["name"] for p in deployed.status().get("parts", []) if p["role"] == "node"} == before
            and bool(deployed.status()["ready"])
        ),
        seconds=180, what="the dead host's node is let go and its worker is elsewhere",
    )  # fmt: skip
    workers = [p for p in deployed.status()["parts"] if p["role"] == "worker"]
    assert len(workers) == 3 and {p["host"] for p in workers} <= before
