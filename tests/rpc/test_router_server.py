"""The `Router` service, in process and as the command `kvstore router`."""

import asyncio
import signal
from collections.abc import AsyncIterator

import grpc.aio
import httpx
import pytest

from kvstore.core.errors import BadInput, NotFound, Refused
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import chain, join_names, pack_tokens
from kvstore.router.members import Member, Members
from kvstore.router.router import RouterConfig
from kvstore.router.server import RouterServer
from kvstore.rpc.channel import open_channel
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import router_pb2, router_pb2_grpc, types_pb2
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.processes import scripted, started
from tests.scripted_worker import ROOT, ScriptedWorker

TOKENS = pack_tokens(range(4 * BLOCK_TOKENS + 1))
NAMES = list(chain(ROOT, TOKENS))
WAIT_MS = PATIENCE_MS


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker("w")
    await worker.start()
    worker.hold(NAMES)
    yield worker
    await worker.stop()


@pytest.fixture
async def stub(worker: ScriptedWorker) -> AsyncIterator[router_pb2_grpc.RouterStub]:
    members = Members.of([Member("worker", "w", worker.address)])
    server = RouterServer(members, config=RouterConfig(wait_ms=WAIT_MS))
    await server.start("127.0.0.1:0")
    async with open_channel(server.address) as channel:
        yield router_pb2_grpc.RouterStub(channel)
    await server.stop()


def request(**fields: object) -> router_pb2.RouteRequest:
    return router_pb2.RouteRequest(root=ROOT, deadline_ms=WAIT_MS, **fields)  # type: ignore[arg-type]


async def test_tokens_and_names_ask_the_same(stub: router_pb2_grpc.RouterStub) -> None:
    by_tokens = await stub.Route(request(tokens=TOKENS))
    assert (by_tokens.worker, by_tokens.hit_tokens) == ("w", 64)
    assert [(s.first, s.count, s.tier, s.place) for s in by_tokens.plan] == [
        (0, 4, types_pb2.TIER_HBM, "w")
    ]
    by_names = await stub.Route(request(names=join_names(NAMES), prompt_tokens=65))
    assert (by_names.hit_tokens, by_names.booking) == (64, by_tokens.booking + 1)
    await stub.Complete(router_pb2.CompleteRequest(booking=by_names.booking, hit_tokens=64))
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await stub.Complete(router_pb2.CompleteRequest(booking=by_names.booking))
    assert isinstance(error_from(unknown.value), NotFound)


async def test_explain_shows_every_worker(stub: router_pb2_grpc.RouterStub) -> None:
    await stub.Route(request(tokens=TOKENS))
    reply = await stub.Explain(request(tokens=TOKENS))
    assert (reply.chosen.worker, reply.chosen.booking) == ("w", 0)
    assert [(w.worker, w.hit_tokens, w.excluded) for w in reply.workers] == [("w", 64, "")]
    (one,) = reply.workers
    assert (one.own_tokens, one.known_tokens, one.queued_tokens) == (64, 64, 1)
    parts = one.queue_ms + one.load_ms + one.prefill_ms
    assert parts == pytest.approx(one.predicted_ttft_ms) == pytest.approx(2.0)
    assert reply.explanation.startswith("w: 2.0 ms = queue 1.0 + load 0.0")
    assert reply.chosen.missed == "the last 1 are always computed"
    with pytest.raises(grpc.aio.AioRpcError) as nobody:
        await stub.Explain(request(tokens=TOKENS, exclude=["w"]))
    refused = error_from(nobody.value)
    assert isinstance(refused, Refused) and refused.retry_after_ms > 0


async def test_what_came_of_a_booking_corrects_the_next(stub: router_pb2_grpc.RouterStub) -> None:
    made = await stub.Route(request(names=b"", prompt_tokens=1_000))
    report = types_pb2.CacheReport(prompt_tokens=1_000, computed_tokens=1_000)
    done = router_pb2.CompleteRequest(
        booking=made.booking, cache=report, ttft_ms=2_500, queue_ms=400, load_ms=100
    )
    first = router_pb2.CompleteRequest()
    first.CopyFrom(done)
    first.first_token = True
    await stub.Complete(first)
    reply = await stub.Explain(request(names=b"", prompt_tokens=1_000))
    assert reply.chosen.predicted_ttft_ms == pytest.approx(2_000)
    await stub.Complete(done)
    for bad in (
        router_pb2.CompleteRequest(booking=1, first_token=True),
        router_pb2.CompleteRequest(booking=1, hit_tokens=1, ttft_ms=float("nan")),
        router_pb2.CompleteRequest(booking=1, hit_tokens=1, load_ms=-1.0),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.Complete(bad)
        assert isinstance(error_from(failure.value), BadInput)


async def test_one_answer_repairs_a_promise_across_a_hole_and_blames_nobody(
    stub: router_pb2_grpc.RouterStub, worker: ScriptedWorker
) -> None:
    """A match steps over one missing block of twenty; who was sent there says so, once."""
    tokens = pack_tokens(range(1_000, 1_000 + 20 * BLOCK_TOKENS + 1))
    names = list(chain(ROOT, tokens))
    worker.hold([*names[:6], *names[7:]])
    await stub.Route(request(tokens=TOKENS))  # waits until the worker is known
    await until_hit(stub, tokens, 320)
    made = await stub.Route(request(tokens=tokens))
    report = types_pb2.CacheReport(prompt_tokens=321, hbm_tokens=96, computed_tokens=225)
    await stub.Complete(router_pb2.CompleteRequest(booking=made.booking, cache=report))
    reply = await stub.Explain(request(tokens=tokens))
    assert reply.chosen.hit_tokens == 96
    assert "believed" not in reply.chosen.missed
    worker.hold(names)
    await until_hit(stub, tokens, 320)


async def until_hit(stub: router_pb2_grpc.RouterStub, tokens: bytes, wanted: int) -> None:
    """Wait until the worker's events made the router expect so many cached tokens."""
    async with asyncio.timeout(PATIENCE_S):
        while (await stub.Explain(request(tokens=tokens))).chosen.hit_tokens != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_an_answer_that_would_come_too_late_is_resource_exhausted(
    stub: router_pb2_grpc.RouterStub,
) -> None:
    late = request(names=b"", prompt_tokens=2_000, ttft_slo_ms=1_000, domain="a", priority=1)

    async def ask_until_refused() -> None:
        """Nobody is refused for rates that the worker has not told yet."""
        for _ in range(200):
            made = await stub.Route(late)
            await stub.Complete(router_pb2.CompleteRequest(booking=made.booking))
            await asyncio.sleep(0.02)

    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await ask_until_refused()
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    refused = error_from(failure.value)
    assert isinstance(refused, Refused) and refused.retry_after_ms == 1_000
    late.ttft_slo_ms = 3_000
    assert (await stub.Route(late)).predicted_ttft_ms == pytest.approx(2_000)


@pytest.mark.parametrize(
    "bad",
    [
        router_pb2.RouteRequest(root=b"short", tokens=TOKENS),
        request(tokens=b"abc"),
        request(),
        request(tokens=TOKENS, names=NAMES[0]),
        request(names=b"x" * 31, prompt_tokens=16),
        request(names=join_names(NAMES), prompt_tokens=16),
        request(tokens=TOKENS, exclude=["w"] * 257),
        router_pb2.RouteRequest(root=ROOT, tokens=TOKENS, deadline_ms=700_000),
        request(tokens=TOKENS, ttft_slo_ms=700_000),
        request(tokens=TOKENS, domain="x" * 257),
    ],
    ids=[
        "root",
        "tokens",
        "empty",
        "both",
        "names",
        "too few",
        "excluded",
        "deadline",
        "slo",
        "domain",
    ],
)
async def test_bad_requests_are_refused(
    stub: router_pb2_grpc.RouterStub, bad: router_pb2.RouteRequest
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.Route(bad)
    assert isinstance(error_from(failure.value), BadInput)


async def test_the_command_serves_until_told_to_end() -> None:
    with scripted("w", "--hold", "4") as worker:
        arguments = ["-m", "kvstore.cli.main", "router", "--json", "--metrics", "127.0.0.1:0"]
        arguments += ["--weight", "paying=3", "--hold-ms", "900", "--max-waiting", "8"]
        with started([*arguments, "--worker", f"w={worker.ready['address']}"]) as router:
            async with open_channel(router.ready["router"]) as channel:
                stub = router_pb2_grpc.RouterStub(channel)
                reply = await stub.Route(
                    request(tokens=TOKENS), wait_for_ready=True, timeout=PATIENCE_S
                )
                assert (reply.worker, reply.hit_tokens) == ("w", 64)
            url = f"http://{router.ready['metrics']}/metrics"
            async with httpx.AsyncClient(trust_env=False) as http:
                assert "kvstore_route_seconds_count 1.0" in (await http.get(url)).text
            router.signal(signal.SIGTERM)
            assert router.process.wait(PATIENCE_S) == 0
