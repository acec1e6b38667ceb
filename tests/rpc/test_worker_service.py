"""A worker over real gRPC with a tiny model: every field checked, streams, events, health."""

import asyncio
import math
import random
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kvworkers.worker import WorkerServer
from kvworkers.worker_config import WorkerConfig
from kvworkers.worker_service import SERVICE_NAME

from kvstore.core.errors import BadInput, Forbidden, KvStoreError, TooLarge
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import Root, chain, pack_tokens
from kvstore.rpc.channel import open_channel
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import types_pb2, watch_pb2, worker_pb2, worker_pb2_grpc
from tests.patience import PATIENCE_S
from tests.tiny_model import MAX_TOKENS, VOCAB, reference_reply, tiny_model
from tests.worker_process import ask, cached_tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")

POOL_BYTES = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker() -> AsyncIterator[WorkerServer]:
    config = WorkerConfig(
        model=str(tiny_model()), pool_bytes=POOL_BYTES, threads=1, max_waiting=4, drain_ms=0
    )
    server = WorkerServer(config)
    await server.start()
    yield server
    await server.stop()


def prompt_of(seed: int, tokens: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCAB) for _ in range(tokens)]


async def failure(address: str, request: worker_pb2.RunRequest) -> KvStoreError:
    async with open_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in worker_pb2_grpc.WorkerStub(channel).Run(request, timeout=PATIENCE_S):
                pass
    return error_from(raised.value)


def request_with(**changes: Any) -> worker_pb2.RunRequest:
    sampling = {"max_tokens": 4, **changes.pop("sampling", {})}
    fields = {"tokens": pack_tokens([5, 6]), **changes}
    return worker_pb2.RunRequest(sampling=worker_pb2.Sampling(**sampling), **fields)


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (request_with(tokens=b""), BadInput, "tokens are empty"),
        (request_with(tokens=b"abc"), BadInput, "multiple of 4"),
        (request_with(tokens=pack_tokens([VOCAB])), BadInput, f"token id {VOCAB}"),
        (request_with(tokens=pack_tokens([2**32 - 1])), BadInput, "vocabulary"),
        (request_with(tokens=pack_tokens([5] * MAX_TOKENS)), TooLarge, "context"),
        (request_with(sampling={"max_tokens": 0}), BadInput, "max_tokens"),
        (request_with(sampling={"max_tokens": 2**32 - 1}), TooLarge, "context"),
        (request_with(sampling={"temperature": -1.0}), BadInput, "temperature"),
        (request_with(sampling={"temperature": math.nan}), BadInput, "temperature"),
        (request_with(sampling={"top_p": 1.5}), BadInput, "top_p"),
        (request_with(sampling={"top_p": -0.5}), BadInput, "top_p"),
        (request_with(sampling={"logprobs": 1_000}), BadInput, "logprobs"),
        (request_with(sampling={"stop_token_ids": [VOCAB]}), BadInput, "stop token"),
        (request_with(sampling={"stop_token_ids": range(100)}), BadInput, "stop tokens"),
        (request_with(share_domain="someone"), Forbidden, "someone"),
        (request_with(cache_salt=b"x" * 5_000), TooLarge, "cache_salt"),
        (request_with(request_id="x" * 300), TooLarge, "request_id"),
        (request_with(request_id="a\nb"), BadInput, "request_id"),
        (request_with(deadline_ms=2**31), BadInput, "deadline_ms"),
    ],
)
async def test_every_field_is_checked_and_named(
    worker: WorkerServer, request_: worker_pb2.RunRequest, error: type[KvStoreError], says: str
) -> None:
    raised = await failure(worker.address, request_)
    assert type(raised) is error
    assert says in str(raised)


async def test_describe_says_what_a_router_needs(worker: WorkerServer) -> None:
    async with open_channel(worker.address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        told = await stub.Describe(worker_pb2.DescribeRequest(share_domain="default"))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Describe(worker_pb2.DescribeRequest(share_domain="other"))
    assert isinstance(error_from(raised.value), Forbidden)
    assert told.worker == "worker-0" and told.incarnation == worker.incarnation > 0
    assert len(told.root) == 32 and told.block_bytes == 4096
    assert told.max_model_tokens == MAX_TOKENS
    assert told.kv_capacity_tokens == POOL_BYTES // 4096 * BLOCK_TOKENS
    assert told.namespace.layers == 2 and told.device == "cpu"


async def test_a_reply_comes_with_its_account(worker: WorkerServer) -> None:
    prompt = prompt_of(1, 50)
    first = await ask(worker.address, prompt, max_tokens=12)
    second = await ask(worker.address, prompt, max_tokens=12)
    assert first.tokens == second.tokens == reference_reply(prompt, 12)
    assert cached_tokens(first.cache) == 0
    assert first.cache.miss_reason == types_pb2.MISS_REASON_DISABLED
    assert second.cache.hbm_tokens == cached_tokens(second.cache) == 48
    assert second.cache.miss_reason == types_pb2.MISS_REASON_NONE
    assert first.ttft_ms > 0 and first.finish_reason in ("length", "stop")


async def test_a_caller_that_cancels_frees_its_pages(worker: WorkerServer) -> None:
    request = request_with(sampling={"max_tokens": 400, "ignore_eos": True})
    async with open_channel(worker.address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Run(request, timeout=PATIENCE_S)
        await call.read()
        call.cancel()
    async with asyncio.timeout(PATIENCE_S):
        while worker.registry.get_sample_value("kvstore_worker_running") != 0:
            await ask(worker.address, [5], max_tokens=1)


async def test_a_full_queue_says_when_to_come_back(worker: WorkerServer) -> None:
    request = request_with(
        tokens=pack_tokens(prompt_of(2, 16)), sampling={"max_tokens": 450, "ignore_eos": True}
    )
    async with open_channel(worker.address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        calls = [stub.Run(request, timeout=PATIENCE_S) for _ in range(40)]
        refused = [call for call in calls if await _refused(call)]
        for call in calls:
            call.cancel()
    assert refused
    trailing = dict(await refused[0].trailing_metadata() or ())
    assert int(trailing["kvstore-retry-after-ms"]) > 0


async def _refused(call: Any) -> bool:
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return False


async def test_watch_lists_pages_and_load(worker: WorkerServer) -> None:
    prompt = prompt_of(3, 40)
    await ask(worker.address, prompt)
    async with open_channel(worker.address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        told = await stub.Describe(worker_pb2.DescribeRequest())
        names = b"".join(chain(Root(told.root), pack_tokens(prompt)))
        listed, kinds, reply = b"", [], watch_pb2.WatchReply()
        async for reply in stub.Watch(watch_pb2.WatchRequest(), timeout=PATIENCE_S):
            kinds.append(reply.WhichOneof("what"))
            if kinds[-1] == "slice":
                assert reply.slice.tier == types_pb2.TIER_HBM
                listed += reply.slice.names
            if kinds[-1] == "load":
                break
    assert kinds[0] == "begin" and "end" in kinds and "mark" in kinds
    assert all(names[at : at + 32] in listed for at in range(0, len(names), 32))
    load = reply.load
    assert load.kv_capacity_bytes == POOL_BYTES and load.kv_used_bytes >= 2 * 4096
    assert load.decode_tokens_per_s > 0 and load.prefill_linear_s > 0


async def test_health_and_metrics_are_served(worker: WorkerServer) -> None:
    async with open_channel(worker.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE_NAME):
            reply = await stub.Check(
                health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S
            )
            assert reply.status == health_pb2.HealthCheckResponse.SERVING

    def fetch() -> str:
        with urllib.request.urlopen(
            f"http://{worker.metrics_address}/metrics", timeout=PATIENCE_S
        ) as page:
            return str(page.read().decode())

    text = await asyncio.to_thread(fetch)
    assert "kvstore_worker_output_tokens_total" in text
    assert "kvstore_worker_kv_capacity_bytes 1.048576e+06" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": ""}, "name"),
        ({"pool_bytes": 0}, "pool_bytes"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"threads": 0}, "threads"),
        ({"metrics": "nowhere"}, "metrics"),
        ({"drain_ms": -1}, "drain_ms"),
        ({"max_running": 0}, "max_running"),
        ({"role": "idle"}, "role 'idle'"),
        ({"swap_bytes": -1}, "swap_bytes"),
    ],
)
async def test_bad_configuration_names_the_field(change: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        WorkerConfig(**change)


async def test_a_pool_below_one_block_is_refused() -> None:
    server = WorkerServer(WorkerConfig(model=str(tiny_model()), pool_bytes=100, threads=1))
    with pytest.raises(BadInput, match="pool_bytes"):
        await server.start()
