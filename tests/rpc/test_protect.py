"""TLS, tokens and tenants through the real entries: node process, router, HTTP and gRPC frontends.

Reaches `kvworkers.frontends.access`, `kvworkers.frontends.tenancy`, `kvstore.rpc.metrics_port`.
"""

import asyncio
import json
import ssl
import urllib.request
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import openai
import pytest
from kvworkers.frontends.access import role_for
from kvworkers.frontends.server import FrontendConfig, FrontendServer, serving
from kvworkers.frontends.tenancy import domain_salt
from prometheus_client import CollectorRegistry

from kvstore.client import Client
from kvstore.core.errors import BadInput, Forbidden, KvStoreError, Unauthenticated, WrongRoot
from kvstore.core.names import BlockName, chain, pack_tokens
from kvstore.router.members import Member, Members
from kvstore.router.server import RouterServer
from kvstore.rpc.channel import open_channel
from kvstore.rpc.credentials import Credentials
from kvstore.rpc.errors import error_from
from kvstore.rpc.identity import Role
from kvstore.rpc.metrics_port import serve_metrics
from kvstore.rpc.v1 import (
    cache_pb2,
    cache_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    watch_pb2,
)
from kvstore.testing.node import RunningNode, start_node
from tests.byte_tokenizer import make_byte_tokenizer
from tests.patience import PATIENCE_S, PATIENT
from tests.scripted_worker import ScriptedWorker
from tests.security_fixture import CERTIFIED, STRANGER, TOKENS, Secured, secured
from tests.session_process import PAYLOAD, SHARES, namespace

ASK = "What is the capital of France, and which rivers meet in Lyon?"
WRONG = "wrong-token-0123456789abcdef"


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Secured:
    return secured(tmp_path_factory.mktemp("mutual"), mutual=True)


@pytest.fixture(scope="module")
def node(rules: Secured) -> Iterator[RunningNode]:
    with start_node(arena_bytes=32 << 20, options=["--security", str(rules.file)]) as running:
        yield running


def tenant(node: RunningNode, rules: Secured, name: str) -> Client:
    return Client.connect(
        node.run_dir, namespace=namespace("shared model"), payload_bytes=PAYLOAD, shares=SHARES,
        config=PATIENT, name=name, credentials=rules.credentials(name),
    )  # fmt: skip


async def stats(address: str, credentials: Credentials) -> cache_pb2.StatsReply | KvStoreError:
    async with open_channel(address, credentials) as channel:
        try:
            reply: cache_pb2.StatsReply = await cache_pb2_grpc.CacheNodeStub(channel).Stats(
                cache_pb2.StatsRequest(), timeout=PATIENCE_S
            )
        except grpc.aio.AioRpcError as failure:
            return error_from(failure)
        return reply


async def test_the_nodes_port_wants_a_certificate_and_an_identity(
    node: RunningNode, rules: Secured
) -> None:
    answer = await stats(node.listen, rules.credentials("monitor"))
    assert isinstance(answer, cache_pb2.StatsReply) and answer.node == node.name
    refusals = {
        "no token": (Credentials(ca=rules.ca.read_bytes()), "Unreachable"),
        "plaintext": (Credentials(), "Unreachable"),
        "no certificate": (rules.credentials("monitor", certificate=""), "Unreachable"),
        "a wrong token": (rules.credentials(WRONG), "Unauthenticated"),
        "a stranger's certificate": (
            rules.credentials("", certificate=STRANGER),
            "Unauthenticated",
        ),
        "no watch role": (rules.credentials("team-a"), "Forbidden"),
        "no watch role by certificate": (rules.credentials("", certificate=CERTIFIED), "Forbidden"),
    }
    found = {
        what: type(await stats(node.listen, shown)).__name__
        for what, (shown, _) in refusals.items()
    }
    assert found == {what: expected for what, (_, expected) in refusals.items()}


async def test_watching_and_clearing_are_separate_roles(node: RunningNode, rules: Secured) -> None:
    async def clear(name: str) -> cache_pb2.ClearReply:
        async with open_channel(node.listen, rules.credentials(name)) as channel:
            stub = cache_pb2_grpc.CacheNodeStub(channel)
            try:
                reply: cache_pb2.ClearReply = await stub.Clear(
                    cache_pb2.ClearRequest(root=bytes(32)), timeout=PATIENCE_S
                )
            except grpc.aio.AioRpcError as failure:
                raise error_from(failure) from failure
            return reply

    before = len(rules.audit_log.read_text().splitlines())
    assert (await clear("operator")).blocks == 0
    with pytest.raises(Forbidden):
        await clear("monitor")
    async with open_channel(node.listen, rules.credentials("operator")) as channel:
        watching = cache_pb2_grpc.CacheNodeStub(channel).Watch(
            watch_pb2.WatchRequest(subscriber="x"), timeout=PATIENCE_S
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await watching.read()
        assert isinstance(error_from(refused.value), Forbidden)
    lines = [json.loads(line) for line in rules.audit_log.read_text().splitlines()][before:]
    assert [(line["principal"], line["outcome"]) for line in lines] == [
        ("operator", "ok"),
        ("monitor", "Forbidden"),
    ]


def test_tenants_of_one_node_see_nothing_of_each_other(node: RunningNode, rules: Secured) -> None:
    prompt = pack_tokens(range(16 * 4))

    def names(client: Client) -> list[BlockName]:
        return list(chain(client.root, prompt))

    with tenant(node, rules, "team-a") as one, tenant(node, rules, "team-b") as other:
        assert one.root != other.root
        one.put(names(one), [b"a" * PAYLOAD] * 4)
        assert one.lookup(names(one)).prefix == 4
        # Under its own root the same prompt is absent, exactly as one that nobody ever sent …
        never = list(chain(other.root, pack_tokens([7] * 16 * 4)))
        seen, unseen = other.lookup(names(other)), other.lookup(never)
        assert seen == unseen
        assert seen.prefix == 0
        assert other.acquire(names(other)).reason is other.acquire(never).reason
        # … the other's very names find nothing there either, and pin nothing …
        assert other.lookup(names(one)) == unseen
        assert other.pin(names(one), ttl_ms=60_000) == other.pin(never, ttl_ms=60_000) == 0
        # … and the other's root is no root of this session.
        other._inner._link.session.root = one.root
        with pytest.raises(WrongRoot):
            other.lookup(names(one))
        assert one.get(names(one)) == [b"a" * PAYLOAD] * 4


async def test_a_sessions_token_is_worth_nothing_to_another_tenant(
    node: RunningNode, rules: Secured
) -> None:
    client = await asyncio.to_thread(tenant, node, rules, "team-a")
    try:
        session = client._inner._link.session
        request = cache_pb2.LookupRequest(root=client.root, names=bytes(32))
        stolen = (("kvstore-session-bin", session.grant.token),)
        async with open_channel(node.listen, rules.credentials("team-b")) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await cache_pb2_grpc.CacheNodeStub(channel).Lookup(
                    request, timeout=PATIENCE_S, metadata=stolen
                )
            assert isinstance(error_from(refused.value), WrongRoot)
    finally:
        await asyncio.to_thread(client.close)


def test_metrics_come_over_tls_to_who_shows_a_certificate(
    node: RunningNode, rules: Secured
) -> None:
    port = serve_metrics("--metrics", "127.0.0.1:0", CollectorRegistry(), rules.config)
    try:
        for address in (node.metrics, port.address):
            trusting = ssl.create_default_context(cafile=str(rules.ca))
            with pytest.raises(OSError, match=r"(?i)certificate|reset|closed|timed|EOF"):
                urllib.request.urlopen(
                    f"https://{address}/metrics", timeout=PATIENCE_S, context=trusting
                ).read()
            trusting.load_cert_chain(
                rules.directory / f"{CERTIFIED}.pem", rules.directory / f"{CERTIFIED}.key"
            )
            with urllib.request.urlopen(
                f"https://{address}/metrics", timeout=PATIENCE_S, context=trusting
            ) as page:
                assert page.status == 200
    finally:
        port.close()
    one_way = replace(
        rules.config,
        client_certificates=False,
        identities=tuple(replace(e, certificates=()) for e in rules.config.identities),
    )
    with pytest.raises(BadInput, match="client_certificates"):
        serve_metrics("--metrics", "0.0.0.0:0", CollectorRegistry(), one_way)


@asynccontextmanager
async def frontend(
    directory: Path, rules: Secured
) -> AsyncIterator[tuple[FrontendServer, ScriptedWorker]]:
    model = make_byte_tokenizer(directory)
    worker = ScriptedWorker("w", reply=list(b"Paris."), security=rules.config)
    await worker.start()
    config = FrontendConfig(model=model, security=rules.file)
    try:
        async with serving(config) as server:
            await server.set_members([Member("worker", "w", worker.address)])
            async with asyncio.timeout(PATIENCE_S):
                while not server.ready():  # noqa: ASYNC110 - set by another task
                    await asyncio.sleep(0.01)
            yield server, worker
    finally:
        await worker.stop()


@pytest.fixture
def plain_tls(tmp_path: Path) -> Secured:
    directory = tmp_path / "tls"
    directory.mkdir()
    return secured(directory)


def https(server: FrontendServer, rules: Secured, token: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"https://{server.http_address}", trust_env=False, timeout=PATIENCE_S,
        verify=ssl.create_default_context(cafile=str(rules.ca)),
        headers={"authorization": f"Bearer {token}"} if token else {},
    )  # fmt: skip


async def ask(server: FrontendServer, rules: Secured, name: str, **extra: Any) -> Any:
    url = f"https://{server.http_address}/v1"
    trusting = ssl.create_default_context(cafile=str(rules.ca))
    async with (
        openai.DefaultAsyncHttpxClient(verify=trusting, trust_env=False) as http,
        openai.AsyncOpenAI(
            base_url=url, api_key=TOKENS[name], max_retries=0, http_client=http
        ) as client,
    ):
        reply = await client.chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": ASK}], **extra
        )
        return reply.model_extra["kvstore"]


async def test_two_tenants_with_one_prompt_share_no_hit(tmp_path: Path, plain_tls: Secured) -> None:
    async with frontend(tmp_path, plain_tls) as (server, worker):
        assert (await ask(server, plain_tls, "team-a"))["cached_tokens"]["hbm"] == 0
        for _ in range(2):
            await ask(server, plain_tls, "team-b")
        # A tenant who knows the derivation cannot ask in another's name either.
        forged = domain_salt("team-a", b"").decode("latin-1")
        await ask(server, plain_tls, "team-b", extra_body={"kvstore": {"cache_salt": forged}})
        async with open_channel(server.grpc_address, plain_tls.credentials("team-a")) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            request = inference_pb2.GenerateRequest(model="scripted", text=ASK)
            request.sampling.max_tokens = 8
            assert [reply async for reply in stub.Generate(request, timeout=PATIENCE_S)]
    salts = [request.cache_salt for request in worker.requests]
    assert salts[0] == salts[4] == domain_salt("team-a", b"")
    assert salts[1] == salts[2] == domain_salt("team-b", b"")
    assert salts[3] not in (salts[0], salts[1])
    # What the salt does to names: from the first block on none is shared.
    tokens = array("I", range(64)).tobytes()
    first, second = (set(worker.names_of(tokens, salt)) for salt in salts[:2])
    assert len(first) == len(second) == 4 and first.isdisjoint(second)


async def test_the_http_door(tmp_path: Path, plain_tls: Secured) -> None:
    body = {"model": "scripted", "messages": [{"role": "user", "content": ASK}]}
    async with frontend(tmp_path, plain_tls) as (server, worker):
        answers = {}
        for name in ("", WRONG, "team-a", "monitor", "operator"):
            async with https(server, plain_tls, TOKENS.get(name, name)) as http:
                answers[name] = [
                    (await http.get("/health")).status_code,
                    (await http.post("/v1/chat/completions", json=body)).status_code,
                    (await http.get("/metrics")).status_code,
                    (await http.get("/whatever/comes")).status_code,
                ]
        assert answers == {
            "": [200, 401, 401, 401],
            WRONG: [200, 401, 401, 401],
            "team-a": [200, 200, 403, 403],
            "monitor": [200, 403, 200, 404],
            "operator": [200, 403, 403, 403],
        }
        assert len(worker.requests) == 1
        async with https(server, plain_tls, TOKENS["team-a"]) as http:
            huge = await http.get("/v1/models", headers={"x": "y" * 40_000})
            assert (huge.status_code, "headers" in huge.text) == (400, True)
        async with httpx.AsyncClient(trust_env=False) as http:
            with pytest.raises(httpx.HTTPError):
                await http.get(f"http://{server.http_address}/health")
    assert role_for("/admin/drain") is Role.ADMIN


async def test_a_tenant_over_its_rate_gets_429_and_others_do_not(tmp_path: Path) -> None:
    directory = tmp_path / "rated"
    directory.mkdir()
    rules = secured(directory, calls_per_s=0.01, burst=2)
    async with frontend(tmp_path, rules) as (server, _):
        async with https(server, rules, TOKENS["team-a"]) as http:
            seen = [await http.get("/v1/models") for _ in range(3)]
        assert [reply.status_code for reply in seen] == [200, 200, 429]
        assert int(seen[2].headers["retry-after"]) >= 1
        async with https(server, rules, TOKENS["team-b"]) as http:
            assert (await http.get("/v1/models")).status_code == 200


async def test_a_router_follows_its_members_over_tls_and_lets_frontends_in(
    rules: Secured,
) -> None:
    worker = ScriptedWorker("w", security=rules.config)
    await worker.start()
    router = RouterServer(
        Members.of([Member("worker", "w", worker.address)]), security=rules.config
    )
    await router.start("127.0.0.1:0")
    try:
        request = router_pb2.RouteRequest(root=bytes(range(32)), prompt_tokens=64)
        async with open_channel(router.address, rules.credentials("cluster")) as channel:
            reply = await router_pb2_grpc.RouterStub(channel).Route(request, timeout=PATIENCE_S)
            assert reply.worker == "w"
        async with open_channel(router.address, rules.credentials("team-a")) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await router_pb2_grpc.RouterStub(channel).Route(request, timeout=PATIENCE_S)
            assert isinstance(error_from(refused.value), Forbidden)
    finally:
        await router.stop()
        await worker.stop()


async def test_no_secret_reaches_a_log(
    node: RunningNode, rules: Secured, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(0)
    assert isinstance(await stats(node.listen, rules.credentials(WRONG)), Unauthenticated)
    async with frontend(tmp_path, rules_without_certificates(tmp_path)) as (server, _):
        plain = rules_without_certificates(tmp_path)
        async with https(server, plain, WRONG) as http:
            assert (await http.get("/v1/models")).status_code == 401
    written = caplog.text + node.log.read_text() + rules.audit_log.read_text()
    for secret in (*TOKENS.values(), WRONG, "PRIVATE KEY"):
        assert secret not in written
    command = await asyncio.to_thread(Path(f"/proc/{node.node_pid}/cmdline").read_text)
    assert str(rules.file) in command
    assert not any(token in command for token in TOKENS.values())


def rules_without_certificates(directory: Path) -> Secured:
    where = directory / "one-way"
    if where.exists():
        return Secured(where, where / "security.toml", where / "audit.jsonl")
    where.mkdir()
    return secured(where)


def test_a_port_beyond_loopback_is_refused_by_the_command(tmp_path: Path) -> None:
    from kvstore.cli.main import run

    common = ["node", "--run-dir", str(tmp_path), "--arena-bytes", "64MiB"]
    assert run([*common, "--listen", "0.0.0.0:0"]) == 2
    assert run([*common, "--metrics", "0.0.0.0:0"]) == 2
    assert run(["router", "--worker", "127.0.0.1:1", "--listen", "0.0.0.0:0"]) == 2
