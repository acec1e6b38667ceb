"""`kvstore node inspect` on a real node, and the service's manners."""

import asyncio
import json
from collections.abc import Iterator

import grpc.aio
import pytest

from kvstore.cli import inspection
from kvstore.cli.inspection import request_of
from kvstore.cli.main import run
from kvstore.core.errors import BadInput
from kvstore.core.names import BlockName
from kvstore.rpc.channel import open_channel
from kvstore.rpc.v1 import inspect_pb2, inspect_pb2_grpc
from kvstore.service.inspection import MAX_SLOTS, MIN_PREFIX_BYTES
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_S
from tests.session_process import PAYLOAD, connect, names_of


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=8 << 20) as running:
        yield running


def ask(node: RunningNode, request: inspect_pb2.InspectRequest) -> inspect_pb2.InspectReply:
    async def call() -> inspect_pb2.InspectReply:
        async with open_channel(node.listen) as channel:
            stub = inspect_pb2_grpc.InspectorStub(channel)
            reply: inspect_pb2.InspectReply = await stub.Inspect(request, timeout=PATIENCE_S)
            return reply

    return asyncio.run(call())


def test_a_block_is_found_by_name_and_by_slot(
    node: RunningNode, capsys: pytest.CaptureFixture[str]
) -> None:
    with connect(node.run_dir, "inspected") as client:
        names = names_of(client, 1, 3)
        client.put(names, [bytes([n]) * PAYLOAD for n in range(3)])
        acquired = client.acquire(names)
        assert acquired.lease
        directory = str(node.run_dir)
        assert run(["node", "inspect", names[1].hex()[:16], "--run-dir", directory]) == 0
        shown = capsys.readouterr().out
        assert f"name {names[1].hex()}" in shown and "may be leased" in shown
        assert "inspected" in shown and "block 1 of the prompt" in shown
        argv = ["node", "--run-dir", directory, "inspect", "0x" + names[1].hex(), "--json"]
        assert run(argv) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["state"] in ("committed", "sealed") and facts["domain"] == "default"
        assert facts["pins"] >= 1 and facts["indexed"] and facts["below"] == []
        client.settle(release=[acquired.lease])
        assert run(["node", "inspect", str(facts["slot"]), "--run-dir", directory, "--json"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert (again["name"], again["generation"]) == (names[1].hex(), facts["generation"])
        assert run(["node", "inspect", "500", "--run-dir", directory]) == 0
        assert "was never used" in capsys.readouterr().out


def test_what_is_not_there_is_said(node: RunningNode, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(node.run_dir)
    assert run(["node", "inspect", "ff" * 32, "--run-dir", directory]) == 1
    assert "no block here" in capsys.readouterr().err
    assert run(["node", "inspect", "9999999", "--run-dir", directory]) == 2
    assert "slot 9999999; the arena has" in capsys.readouterr().err
    assert run(["node", "inspect", "1"]) == 2
    assert "--run-dir" in capsys.readouterr().err
    assert run(["node", "inspect", "1", "--run-dir", directory + "/nowhere"]) == 2
    assert run(["node"]) == 2
    assert "--run-dir" in capsys.readouterr().err


def test_many_blocks_of_one_beginning_are_cut_off(node: RunningNode) -> None:
    with connect(node.run_dir, "many") as client:
        numbers = range(MAX_SLOTS + 5)
        names = [BlockName(bytes(4) + n.to_bytes(4, "big") + bytes(24)) for n in numbers]
        client.put(names, [bytes(PAYLOAD)] * len(names))
        reply = ask(node, inspect_pb2.InspectRequest(name=bytes(4)))
        assert len(reply.slots) == MAX_SLOTS and reply.more
        assert {slot.name for slot in reply.slots} < set(names)
        only = ask(node, inspect_pb2.InspectRequest(name=names[5][:8]))
        assert [slot.name for slot in only.slots] == [names[5]] and not only.more


@pytest.mark.parametrize("name", [b"", b"abc", b"x" * 33])
def test_names_of_no_use_are_refused(node: RunningNode, name: bytes) -> None:
    assert MIN_PREFIX_BYTES == 4
    with pytest.raises(grpc.aio.AioRpcError, match="name has 4 to 32 bytes") as caught:
        ask(node, inspect_pb2.InspectRequest(name=name))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_what_is_typed_is_a_slot_or_a_name() -> None:
    assert request_of("0") == inspect_pb2.InspectRequest(slot=0)
    assert request_of("0x00000012").name == b"\0\0\0\x12"
    assert request_of("12345678").name == bytes.fromhex("12345678")
    for wrong in ("", "-1", "zz", "abcdef1", "ab" * 33, "0x12"):
        with pytest.raises(BadInput, match="neither"):
            request_of(wrong)
    assert inspection.facts_of(inspect_pb2.SlotReport(slot=3))["slot"] == 3
