"""The bulk port and the neighbours behind TLS and identities: who gets bytes, and who none."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvstore.client import Client
from kvstore.client.remote import AsyncRemoteClient
from kvstore.core.errors import Forbidden, Unauthenticated, Unreachable
from kvstore.core.names import chain, pack_tokens
from kvstore.core.outcomes import Outcome, SettleOutcome
from kvstore.rpc.channel import open_channel
from kvstore.rpc.credentials import Credentials
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import cache_pb2, cache_pb2_grpc
from kvstore.testing.node import RunningNode, start_node
from kvstore.transport.base import Ticket
from kvstore.transport.bulk import BulkTransport
from tests.patience import PATIENCE_MS, PATIENCE_S, PATIENT
from tests.security_fixture import Secured, secured
from tests.session_process import PAYLOAD, SHARES, namespace

DONE = SettleOutcome.DONE


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Secured:
    return secured(tmp_path_factory.mktemp("bulk"), mutual=True)


@pytest.fixture(scope="module")
def nodes(rules: Secured) -> Iterator[list[RunningNode]]:
    key, peers = rules.directory / "cluster.key", rules.directory / "peers.json"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    options = ("--security", str(rules.file), "--cluster-key-file", str(key), "--peers", str(peers))
    with ExitStack() as stack:
        started = [
            stack.enter_context(start_node(arena_bytes=32 << 20, name=name, options=options))
            for name in ("one", "two")
        ]
        listed = [{"name": node.name, "address": node.listen} for node in started]
        peers.write_text(json.dumps({"peers": listed}))
        yield started


async def remote(node: RunningNode, credentials: Credentials) -> AsyncRemoteClient:
    return await AsyncRemoteClient.connect(
        node.listen, namespace=namespace("shared model"), payload_bytes=PAYLOAD, shares=SHARES,
        config=PATIENT, credentials=credentials,
    )  # fmt: skip


async def test_tenants_read_their_own_over_tls_and_nobody_elses(
    nodes: list[RunningNode], rules: Secured
) -> None:
    async with await remote(nodes[0], rules.credentials("team-a")) as mine:
        names = list(chain(mine.root, pack_tokens(range(32))))
        blocks = [bytes([n]) * PAYLOAD for n in (1, 2)]
        assert await mine.put(names, blocks) == [DONE] * 2
        assert [bytes(block) for block in await mine.get(names)] == blocks
        async with await remote(nodes[0], rules.credentials("team-b")) as other:
            assert other.root != mine.root
            assert await other.get(list(chain(other.root, pack_tokens(range(32))))) == []
            assert await other.get(names) == [], "a name of mine means nothing under their root"
    with pytest.raises(Forbidden):
        await remote(nodes[0], rules.credentials("monitor"))
    with pytest.raises((Unauthenticated, Unreachable)):
        await remote(nodes[0], Credentials())


async def test_the_bulk_port_speaks_tls_only(nodes: list[RunningNode], rules: Secured) -> None:
    ticket = Ticket(bytes(32), nodes[0].bulk, 1_000)
    into = [memoryview(bytearray(4_096))]
    plain = BulkTransport()
    assert await plain.fetch(ticket, into, stall_deadline_ms=PATIENCE_MS) == [Outcome.LATE]
    await plain.close()
    shown = rules.credentials("team-a")
    wrapped = BulkTransport(tls=shown.ssl())
    assert await wrapped.fetch(ticket, into, stall_deadline_ms=PATIENCE_MS) == [Outcome.REFUSED]
    await wrapped.close()
    elsewhere = BulkTransport(tls=shown.ssl(), server_name="elsewhere.example")
    assert await elsewhere.fetch(ticket, into, stall_deadline_ms=PATIENCE_MS) == [Outcome.LATE]
    await elsewhere.close()


def test_neighbours_lend_over_tls(nodes: list[RunningNode], rules: Secured) -> None:
    def connect(node: RunningNode) -> Client:
        return Client.connect(
            node.run_dir, namespace=namespace("lent"), payload_bytes=PAYLOAD, shares=SHARES,
            config=PATIENT, credentials=rules.credentials("team-a"),
        )  # fmt: skip

    with connect(nodes[0]) as here, connect(nodes[1]) as there:
        names = list(chain(there.root, pack_tokens(range(64))))
        blocks = [bytes([n]) * PAYLOAD for n in range(4)]
        assert there.put(names, blocks) == [DONE] * 4
        ends = time.monotonic() + PATIENCE_S
        while here.lookup(names).prefix < 4:
            assert time.monotonic() < ends, "the neighbour's blocks were not seen"
            time.sleep(0.02)
        assert here.get(names, deadline_ms=PATIENCE_MS) == blocks


async def test_lending_needs_the_peer_role(nodes: list[RunningNode], rules: Secured) -> None:
    request = cache_pb2.LendRequest(
        root=bytes(32), names=bytes(32), block_bytes=4_096, payload_bytes=4_096, shares=1
    )
    for name, error in (("team-a", Forbidden), ("monitor", Forbidden)):
        async with open_channel(nodes[0].listen, rules.credentials(name)) as channel:
            with pytest.raises(Exception, match="lacks the role peer") as caught:
                await cache_pb2_grpc.CacheNodeStub(channel).Lend(request, timeout=PATIENCE_S)
            assert isinstance(error_from(caught.value), error)  # type: ignore[arg-type]


def test_beyond_loopback_the_bulk_port_wants_security(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="--bulk"):
        start_node(arena_bytes=16 << 20, options=["--bulk", "0.0.0.0:0"])
