"""How long a gateway waits for an endpoint: one external-processing stream for each HTTP request.

    python benchmarks/envoy_pick.py [--requests 400]

`kvstore router --ext-proc` runs as a process over engines that publish vLLM's KV events; this
process speaks to it as Envoy does in full duplex: a stream, the headers, the body in chunks of
64 KiB, and the answer that names the endpoint, its arrival timed from the stream's start. Cases
differ in how the prompt comes (token ids, or a conversation that the model's own tokenizer and
template turn into them), its length, and how many streams are open at once. Before they begin
each endpoint is checked to get what it said to hold. Half of the prompts of ids begin so; asked
for often, such a beginning is hot and the router sends it where it gets another copy. Nothing is
computed here, so no copy ever is made and more are sent `elsewhere`. One JSON line per case on
standard output.
"""

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

import click
import grpc.aio
from kvworkers.models.provision import ensure_model
from transformers import AutoTokenizer

from kvstore.adapters.envoy.messages import DESTINATION
from kvstore.rpc.channel import open_channel
from kvstore.rpc.envoy import ext_proc_pb2 as wire
from kvstore.rpc.envoy import ext_proc_pb2_grpc
from tests.processes import started
from tests.scripted_vllm import ScriptedVllm, stored

ENGINES: Final = 8
HELD_TOKENS: Final = 65_536
"""Tokens of other prompts that each engine says to hold: the view is not empty."""
CHUNK_BYTES: Final = 64 << 10
DUPLEX: Final = wire.BodySendMode.FULL_DUPLEX_STREAMED
WARM: Final = 40
ENDED: Final[Any] = grpc.aio.EOF


class Case(NamedTuple):
    """One way to ask."""

    name: str
    tokens: int
    text: bool
    streams: int


CASES: Final = (
    Case("ids_1k", 1_024, False, 1), Case("ids_8k", 8_192, False, 1),
    Case("ids_8k_16_streams", 8_192, False, 16), Case("chat_1k", 1_024, True, 1),
    Case("chat_8k", 8_192, True, 1),
)  # fmt: skip


class Asked(NamedTuple):
    """A request's body, and the endpoint that holds its beginning, if one does."""

    body: bytes
    held_by: str


async def pick(stub: ext_proc_pb2_grpc.ExternalProcessorStub, asked: Asked) -> tuple[float, bool]:
    """Ask where a request goes; return the milliseconds until an endpoint is named, and
    whether it is one that holds the prompt's beginning.
    """
    began = time.perf_counter()
    call = stub.Process(timeout=30)
    first = wire.ProcessingRequest()
    first.protocol_config.request_body_mode = DUPLEX
    first.protocol_config.response_body_mode = DUPLEX
    for name, value in ((":method", "POST"), (":path", "/v1/chat/completions")):
        first.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    await call.write(first)
    for at in range(0, len(asked.body), CHUNK_BYTES):
        last = at + CHUNK_BYTES >= len(asked.body)
        piece = wire.HttpBody(body=asked.body[at : at + CHUNK_BYTES], end_of_stream=last)
        await call.write(wire.ProcessingRequest(request_body=piece))
    answer = await call.read()
    spent_ms = (time.perf_counter() - began) * 1_000
    endpoint = str(answer.dynamic_metadata["envoy.lb"][DESTINATION])
    await call.done_writing()
    # The body comes back; the booking is free once the stream has ended.
    while await call.read() is not ENDED:
        pass
    return spent_ms, not asked.held_by or endpoint == asked.held_by


async def run_case(
    stub: ext_proc_pb2_grpc.ExternalProcessorStub, case: Case, asked: Sequence[Asked]
) -> dict[str, Any]:
    """Ask everything, `case.streams` at a time; return the case's row."""
    waiting = list(reversed(asked))
    spent, astray = list[float](), 0

    async def stream() -> None:
        nonlocal astray
        while waiting:
            spent_ms, right = await pick(stub, waiting.pop())
            spent.append(spent_ms)
            astray += not right

    await asyncio.gather(*(stream() for _ in range(case.streams)))
    timed = sorted(spent[WARM:])
    return {
        "bench": "envoy_pick", "case": case.name, "unit": "ms", "requests": len(timed),
        "p50": round(statistics.median(timed), 2), "p99": round(timed[int(0.99 * len(timed))], 2),
        "streams": case.streams, "tokens": case.tokens, "endpoints": ENGINES,
        "elsewhere": astray, "body_kib": round(len(asked[0].body) / 1024, 1),
    }  # fmt: skip


def prompts(
    case: Case, count: int, held: dict[str, list[int]], words: Any, dice: random.Random
) -> list[Asked]:
    """Return bodies; every second one begins with what an endpoint holds, where ids are given."""
    bodies = []
    endpoints = list(held)
    for number in range(count):
        where = "" if number % 2 or case.text else endpoints[number // 2 % len(endpoints)]
        if case.text:
            content = words.decode([dice.randrange(1_000, 40_000) for _ in range(case.tokens)])
            body: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
        else:
            start = held[where][: case.tokens // 2] if where else []
            ids = [
                *start,
                *(dice.randrange(1_000, 40_000) for _ in range(case.tokens - len(start))),
            ]
            body = {"prompt": ids}
        bodies.append(Asked(json.dumps({"model": "m", **body}).encode(), where))
    return bodies


@asynccontextmanager
async def engines(dice: random.Random) -> AsyncIterator[tuple[list[str], dict[str, list[int]]]]:
    """Run publishers; give the router's arguments and what each endpoint holds."""
    arguments, held, running = list[str](), dict[str, list[int]](), list[ScriptedVllm]()
    for number in range(ENGINES):
        engine = ScriptedVllm()
        await engine.start()
        running.append(engine)
        address = f"127.0.0.1:{20_000 + number}"  # nobody dials it: a proxy would
        held[address] = [dice.randrange(1_000, 40_000) for _ in range(HELD_TOKENS)]
        await engine.publish(stored(held[address]))
        arguments += ["--vllm", f"engine-{number}={address},{engine.endpoint},{engine.replay}"]
    try:
        yield arguments, held
    finally:
        for engine in running:
            await engine.stop()


async def measured(requests: int) -> list[dict[str, Any]]:
    """Return a row for every case."""
    dice, model = random.Random(5), ensure_model()
    words = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    command = ["-m", "kvstore.cli.main", "router", "--listen", "127.0.0.1:0", "--json"]
    command += ["--ext-proc", "127.0.0.1:0", "--tokenizer", str(model)]
    async with engines(dice) as (members, held):
        run = started([*command, *members])
        router = await asyncio.to_thread(run.__enter__)
        try:
            async with open_channel(router.ready["ext_proc"]) as channel:
                stub = ext_proc_pb2_grpc.ExternalProcessorStub(channel)
                await followed(stub, held)
                rows = []
                for case in CASES:
                    asked = prompts(case, requests + WARM, held, words, dice)
                    rows.append(await run_case(stub, case, asked))
                    click.echo(json.dumps(rows[-1]), err=True)
                return rows
        finally:
            run.__exit__(None, None, None)


async def followed(
    stub: ext_proc_pb2_grpc.ExternalProcessorStub, held: dict[str, list[int]]
) -> None:
    """Wait until what every endpoint holds is known."""
    async with asyncio.timeout(60):
        for endpoint, tokens in held.items():
            asked = Asked(json.dumps({"model": "m", "prompt": tokens[:4_096]}).encode(), endpoint)
            while True:
                try:
                    if (await pick(stub, asked))[1]:
                        break
                except (KeyError, ValueError):  # nobody is alive yet
                    pass
                await asyncio.sleep(0.1)


@click.command()
@click.option("--requests", default=400, show_default=True, type=click.IntRange(min=100))
def main(requests: int) -> None:
    """Measure the time of picks."""
    for row in asyncio.run(measured(requests)):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
