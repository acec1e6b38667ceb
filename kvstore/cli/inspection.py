"""`kvstore node inspect`: what stands in a slot of a node's arena, or where a named block is."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
import grpc.aio

from kvstore.core.errors import BadInput, NotFound
from kvstore.rpc.channel import open_channel
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import inspect_pb2, inspect_pb2_grpc, types_pb2

_DEADLINE_S: Final = 5.0
_NAME: Final = re.compile(r"(?:[0-9a-f]{2}){4,32}", re.ASCII | re.IGNORECASE)
_MAX_SLOT: Final = (1 << 32) - 1
_MAX_SLOT_DIGITS: Final = 7
"""A longer row of digits is the beginning of a name: arenas have fewer slots than 10 million."""


@click.command(short_help="Say what a slot holds, or where a named block is.")
@click.argument("what", metavar="SLOT|NAME")
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Run directory of the node; may stand before `inspect` as well.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON for each slot.")
@click.pass_context
def inspect(context: click.Context, what: str, run_dir: Path | None, *, as_json: bool) -> None:
    """Say what SLOT holds, in what state and for whom; or where the block called NAME is.

    SLOT is a number. NAME is the name's beginning as 8 to 64 hexadecimal digits; `0x` before it
    says so where it could be a number. Reads only. Fails when nothing is called so.
    """
    outer = context.parent.params.get("run_dir") if context.parent is not None else None
    directory = run_dir or outer
    if directory is None:
        raise click.UsageError("--run-dir is missing: whose node?", context)
    reply = asyncio.run(_ask(_address(Path(directory)), request_of(what)))
    if not reply.slots and not reply.below_only:
        raise NotFound(f"no block here has a name that begins with {what}")
    for report in reply.slots:
        click.echo(json.dumps(facts_of(report)) if as_json else "\n".join(lines_of(report)))
    if reply.below_only:
        tiers = [_tier(tier) for tier in reply.below_only]
        click.echo(json.dumps({"below": tiers}) if as_json else f"only below: {', '.join(tiers)}")
    if reply.more:
        click.echo("there are more: give more of the name", err=True)


def request_of(what: str) -> inspect_pb2.InspectRequest:
    """Return the request for what was typed; raises `BadInput` naming it."""
    if what.isascii() and what.isdigit() and len(what) <= _MAX_SLOT_DIGITS:
        return inspect_pb2.InspectRequest(slot=int(what))
    digits = what.removeprefix("0x")
    if not _NAME.fullmatch(digits):
        raise BadInput(f"{what!r} is neither a slot's number nor 8 to 64 hexadecimal digits")
    return inspect_pb2.InspectRequest(name=bytes.fromhex(digits))


def facts_of(report: inspect_pb2.SlotReport) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "slot": report.slot,
        "state": report.state,
        "generation": report.generation,
        "name": report.name.hex(),
        "root": report.root.hex(),
        "domain": report.domain,
        "group": report.group,
        "offset": report.offset,
        "block_bytes": report.block_bytes,
        "position": report.position,
        "servable": report.servable,
        "pins": report.pins,
        "session": report.session,
        "client": report.client,
        "sum": report.sum.hex(),
        "below": [_tier(tier) for tier in report.below],
        "indexed": report.indexed,
    }


def lines_of(report: inspect_pb2.SlotReport) -> Iterator[str]:
    """Iterate over the lines for people."""
    yield f"slot {report.slot}: {report.state}, generation {report.generation}"
    if not report.generation:
        yield "  was never used"
        return
    yield f"  bytes {report.offset} to {report.offset + report.block_bytes} of the arena"
    past = "last " if report.state == "free" else ""
    yield f"  {past}name {report.name.hex()}"
    yield f"  {past}root {report.root.hex()}, block {report.position} of the prompt"
    if report.state == "free":
        return
    yield f"  share domain {report.domain or '(not opened yet)'}, layer group {report.group}"
    yield f"  {'may be leased' if report.servable else 'may not be leased now'}, {report.pins} pins"
    writer = report.client or (f"session {report.session}" if report.session else "")
    yield f"  written by {writer or 'an earlier incarnation'}"
    if not report.indexed:
        yield "  its name leads to another slot"
    yield f"  sum {report.sum.hex() or 'not known yet'}"
    yield f"  copies below: {', '.join(map(_tier, report.below)) or 'none'}"


def _tier(number: int) -> str:
    name: str = types_pb2.Tier.Name(number)
    return name.removeprefix("TIER_").lower()


def _address(run_dir: Path) -> str:
    try:
        return str(json.loads((run_dir / "node.json").read_text(encoding="utf-8"))["rpc"])
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"--run-dir {run_dir} is not a running node's: {error}") from error


async def _ask(address: str, request: inspect_pb2.InspectRequest) -> inspect_pb2.InspectReply:
    async with open_channel(address) as channel:
        stub = inspect_pb2_grpc.InspectorStub(channel)
        try:
            reply: inspect_pb2.InspectReply = await stub.Inspect(request, timeout=_DEADLINE_S)
        except grpc.aio.AioRpcError as failure:
            raise error_from(failure) from failure
    return reply
