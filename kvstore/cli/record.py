"""`kvstore record`: what callers ask a running cache node for, as a trace for `simulate`."""

import asyncio
import json
import signal
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import click
import grpc.aio

from kvstore.cli.values import BYTES
from kvstore.core.errors import BadInput, Unreachable
from kvstore.rpc.channel import open_channel
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import record_pb2, record_pb2_grpc
from kvstore.simulate.recording import TraceWriter

_BEGIN_S = 10.0
"""A node that has not answered by then is not there."""
_DRAIN_S = 0.25
"""Goes on this long after its end, for what the node still gathers (`recorder.GATHER_S`)."""


@click.command(short_help="Record a running cache node's accesses as a trace.")
@click.option(
    "--run-dir", type=click.Path(path_type=Path, file_okay=False),
    help="Run directory of the node on this host.",
)  # fmt: skip
@click.option("--node", metavar="HOST:PORT", help="Address of a node, instead of --run-dir.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True,
    help="FILE.jsonl.gz; must not be there yet.",
)  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="End after this long.")
@click.option(
    "--file-bytes", type=BYTES, default="1GiB", show_default=True,
    help="Begin the next file after this much text.",
)  # fmt: skip
@click.option(
    "--files", type=click.IntRange(1, 1_000), default=4, show_default=True,
    help="Files kept; the oldest is deleted for a new one.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when it has ended.")
def record(
    run_dir: Path | None,
    node: str | None,
    out: Path,
    seconds: float | None,
    file_bytes: int,
    files: int,
    as_json: bool,
) -> None:
    """Record what callers ask a cache node for, until Ctrl-C, SIGTERM or --seconds.

    The trace holds no names, tokens or tenants: blocks are hashed with a salt that never leaves
    the node. One line is one Acquire.
    """
    address = _address(run_dir, node)
    with TraceWriter(out, file_bytes=file_bytes, files=files) as writer:
        dropped = asyncio.run(_record(address, writer, seconds))
        requests = writer.requests
    if as_json:
        facts = {"out": str(out), "requests": requests, "dropped": dropped}
        click.echo(json.dumps(facts))
    else:
        click.echo(f"{out}: {requests} requests, {dropped} dropped", err=True)


def _address(run_dir: Path | None, node: str | None) -> str:
    if (run_dir is None) == (node is None):
        raise BadInput("say either --run-dir or --node")
    if node is not None:
        return node
    assert run_dir is not None
    facts = run_dir / "node.json"
    try:
        return str(json.loads(facts.read_text(encoding="utf-8"))["rpc"])
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"--run-dir {run_dir}: no node has written {facts.name} there") from error


async def _record(address: str, writer: TraceWriter, seconds: float | None) -> int:
    """Write until told to end; returns how many accesses the node had to drop."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    if seconds is not None:
        loop.call_later(seconds, ended.set)
    dropped = 0
    async with open_channel(address) as channel, aclosing(_replies(channel, ended)) as replies:
        async for reply in replies:
            dropped = reply.dropped
            for access in reply.accesses:
                writer.write(
                    access.elapsed_ms,
                    first_block=access.first_block,
                    blocks=access.blocks,
                    block_tokens=reply.block_tokens,
                )
            writer.flush()
    return dropped


async def _replies(
    channel: grpc.aio.Channel, ended: asyncio.Event
) -> AsyncGenerator[record_pb2.RecordReply, None]:
    """Yield what the node sends until `ended`; raises `Unreachable` when the node goes away."""
    call = record_pb2_grpc.RecorderStub(channel).Record(
        record_pb2.RecordRequest(subscriber="kvstore record")
    )
    stop = asyncio.create_task(_after(ended, _DRAIN_S))
    wait_s: float | None = _BEGIN_S
    try:
        while True:
            read = asyncio.ensure_future(call.read())
            await asyncio.wait({read, stop}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if not read.done():
                read.cancel()
                if stop.done():
                    return
                raise Unreachable(f"no answer within {_BEGIN_S:.0f} s")
            reply = read.result()
            if reply is grpc.aio.EOF:  # type: ignore[attr-defined]
                raise Unreachable("the node ended the recording")
            if wait_s is not None:
                click.echo("recording", err=True)
                wait_s = None
            yield reply
            if stop.done():
                return
    except grpc.RpcError as error:
        raise error_from(error) from error
    finally:
        stop.cancel()
        call.cancel()


async def _after(event: asyncio.Event, seconds: float) -> None:
    await event.wait()
    await asyncio.sleep(seconds)
