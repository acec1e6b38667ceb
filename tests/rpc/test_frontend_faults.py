"""What a user sees when workers die, hang, refuse or come back in the middle of a reply."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
from kvworkers.frontends import fleet
from kvworkers.frontends.pipeline import PipelineConfig
from kvworkers.frontends.server import FrontendConfig, FrontendServer, serving

from kvstore.core.errors import BadInput, Refused, Unreachable
from kvstore.router.members import Member
from kvstore.rpc.channel import open_channel
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from tests.byte_tokenizer import END, make_byte_tokenizer
from tests.patience import PATIENCE_MS, PATIENCE_S
from tests.processes import Started, scripted, started
from tests.scripted_worker import ScriptedWorker

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUICK = PipelineConfig(lost_after_ms=1_500, wait_ms=2_000, other_wait_ms=300)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_tokenizer(tmp_path_factory.mktemp("byte-tokenizer"))


@pytest.fixture
async def frontend(model: Path) -> AsyncIterator[FrontendServer]:
    async with serving(FrontendConfig(model=model, pipeline=QUICK)) as server:
        yield server


@pytest.fixture
def processes() -> Iterator[Callable[..., Started]]:
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(scripted(*arguments))


def address(worker: Started | ScriptedWorker) -> str:
    return worker.address if isinstance(worker, ScriptedWorker) else str(worker.ready["address"])


async def follow(frontend: FrontendServer, *workers: Started | ScriptedWorker) -> None:
    """Make the frontend serve with these, and wait until it knows all of them."""
    members = [Member("worker", f"w{at}", address(one)) for at, one in enumerate(workers)]
    await frontend.set_members(members)
    async with asyncio.timeout(PATIENCE_S):
        while not all(  # noqa: ASYNC110 - the view tells nobody
            frontend.worker_ready(member.name) for member in members
        ):
            await asyncio.sleep(0.01)


async def generate(
    frontend: FrontendServer, *, prompt: str = "hi", max_tokens: int = 100, deadline_ms: int = 0
) -> list[inference_pb2.GenerateReply]:
    """Return the replies; raises the error that the frontend gave."""
    request = inference_pb2.GenerateRequest(
        text=prompt, sampling=worker_pb2.Sampling(max_tokens=max_tokens), deadline_ms=deadline_ms
    )
    async with open_channel(frontend.grpc_address) as channel:
        try:
            stub = inference_pb2_grpc.InferenceStub(channel)
            return [reply async for reply in stub.Generate(request)]
        except grpc.aio.AioRpcError as failure:
            raise error_from(failure) from failure


def text(replies: list[inference_pb2.GenerateReply]) -> str:
    return "".join(reply.text for reply in replies)


def retries(frontend: FrontendServer, reason: str) -> float:
    name = "kvstore_request_retries_total"
    return frontend.registry.get_sample_value(name, {"reason": reason}) or 0.0


async def test_a_worker_that_dies_mid_stream_costs_a_retry_and_no_letter(
    frontend: FrontendServer, processes: Callable[..., Started]
) -> None:
    await follow(frontend, processes("w0", "--die-after", "5"), processes("w1"))
    replies = await generate(frontend)
    assert text(replies) == LETTERS
    assert (replies[-1].finish_reason, replies[-1].retries) == ("stop", 1)
    assert replies[-1].output_tokens == 26
    assert {reply.worker for reply in replies} == {"w0", "w1"}
    assert retries(frontend, "Unreachable") == 1
    limited = await generate(frontend, max_tokens=7)
    assert text(limited) == LETTERS[:7]


async def test_limits_hold_across_a_retry(
    frontend: FrontendServer, processes: Callable[..., Started]
) -> None:
    await follow(frontend, processes("w0", "--die-after", "5"), processes("w1"))
    replies = await generate(frontend, max_tokens=8)
    assert (text(replies), replies[-1].finish_reason) == (LETTERS[:8], "length")
    assert replies[-1].retries == 1


async def test_a_worker_that_is_lost_after_its_last_token_costs_nothing(
    frontend: FrontendServer,
) -> None:
    worker = ScriptedWorker("w0", reply=[*LETTERS.encode(), END])
    await worker.start()
    try:
        await follow(frontend, worker)
        for limit, expected in ((5, "length"), (27, "stop")):
            worker.faults.break_after = limit
            replies = await generate(frontend, max_tokens=limit)
            assert text(replies) == LETTERS[:limit]
            assert (replies[-1].finish_reason, replies[-1].retries) == (expected, 0)
        assert len(worker.requests) == 2
    finally:
        await worker.stop()


async def test_a_stopped_worker_is_given_up_and_a_slow_one_is_not(
    frontend: FrontendServer, processes: Callable[..., Started]
) -> None:
    slow = processes("w0", "--step-s", "0.2")
    await follow(frontend, slow)
    assert text(await generate(frontend, max_tokens=10)) == LETTERS[:10]
    asking = asyncio.create_task(generate(frontend))
    other = processes("w1")
    await follow(frontend, slow, other)
    slow.signal(signal.SIGSTOP)
    replies = await asking
    assert (text(replies), replies[-1].worker) == (LETTERS, "w1")


async def test_a_reply_goes_on_elsewhere_when_its_worker_leaves_the_list(
    frontend: FrontendServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "CLOSE_SECONDS", 0.1)
    leaving, staying = ScriptedWorker("w0"), ScriptedWorker("w1")
    leaving.faults.hang_after = 3
    for worker in (leaving, staying):
        await worker.start()
    try:
        await follow(frontend, leaving)
        asking = asyncio.create_task(generate(frontend))
        async with asyncio.timeout(PATIENCE_S):
            while not leaving.running:  # noqa: ASYNC110 - it runs behind a socket
                await asyncio.sleep(0.01)
        await frontend.set_members([Member("worker", "w1", staying.address)])
        replies = await asking
        assert (text(replies), replies[-1].retries) == (LETTERS, 1)
    finally:
        for worker in (leaving, staying):
            await worker.stop()


async def test_a_hung_call_at_a_living_worker_ends_at_the_deadline(
    frontend: FrontendServer,
) -> None:
    worker = ScriptedWorker("w0")
    worker.faults.hang_after = 3
    await worker.start()
    try:
        await follow(frontend, worker)
        with pytest.raises(Unreachable, match="deadline"):
            await generate(frontend, deadline_ms=700)
    finally:
        await worker.stop()


async def test_the_same_worker_is_asked_again_when_it_is_the_only_one(
    model: Path, processes: Callable[..., Started]
) -> None:
    first = processes("w0", "--die-after", "5")
    patient = FrontendConfig(model=model, pipeline=replace(QUICK, wait_ms=PATIENCE_MS))
    async with serving(patient) as frontend:
        await follow(frontend, first)
        asking = asyncio.create_task(generate(frontend))
        await asyncio.to_thread(first.process.wait, PATIENCE_S)
        processes("w0", "--incarnation", "2", "--listen", address(first))
        replies = await asking
    assert text(replies) == LETTERS
    assert replies[-1].retries >= 1


async def test_a_refusal_moves_on_and_all_refusals_reach_the_caller(
    frontend: FrontendServer,
) -> None:
    workers = [ScriptedWorker(f"w{at}") for at in range(2)]
    for worker in workers:
        await worker.start()
    try:
        workers[0].faults.refuse = Refused("full", 1_500)
        await follow(frontend, *workers)
        replies = await generate(frontend)
        assert (text(replies), replies[-1].worker, replies[-1].retries) == (LETTERS, "w1", 1)
        workers[1].faults.refuse = Refused("full too", 2_500)
        with pytest.raises(Refused) as refused:
            await generate(frontend)
        assert refused.value.retry_after_ms in (1_500, 2_500)
        assert retries(frontend, "Refused") > 1
    finally:
        for worker in workers:
            await worker.stop()


async def test_a_failing_worker_is_tried_a_bounded_number_of_times(
    frontend: FrontendServer,
) -> None:
    worker = ScriptedWorker("w0")
    worker.faults.break_after = 0
    await worker.start()
    try:
        await follow(frontend, worker)
        with pytest.raises(Unreachable):
            await generate(frontend)
        assert 1 <= len(worker.requests) <= QUICK.retries + 1
    finally:
        await worker.stop()


async def test_a_mistake_of_the_caller_is_not_retried(frontend: FrontendServer) -> None:
    worker = ScriptedWorker("w0")
    worker.faults.refuse = BadInput("no such thing")
    await worker.start()
    try:
        await follow(frontend, worker)
        with pytest.raises(BadInput, match="no such thing"):
            await generate(frontend)
        assert len(worker.requests) == 1
    finally:
        await worker.stop()


async def test_too_many_at_once_are_refused(model: Path) -> None:
    worker = ScriptedWorker("w0")
    worker.faults.hang_after = 1
    await worker.start()
    config = FrontendConfig(model=model, pipeline=replace(QUICK, max_in_flight=1))
    try:
        async with serving(config) as frontend:
            await follow(frontend, worker)
            asking = asyncio.create_task(generate(frontend))
            async with asyncio.timeout(PATIENCE_S):
                while not worker.running:  # noqa: ASYNC110 - it runs behind a socket
                    await asyncio.sleep(0.01)
            with pytest.raises(Refused, match="1 requests are running"):
                await generate(frontend)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
    finally:
        await worker.stop()


async def test_the_command_serves_and_ends_on_sigterm(
    model: Path, processes: Callable[..., Started]
) -> None:
    worker = processes("w0")
    arguments = ["-m", "kvworkers.frontends", "--model", str(model), "--json", "--http"]
    flags = ["127.0.0.1:0", "--worker", f"w0={worker.ready['address']}"]
    with started([*arguments, *flags]) as frontend:
        async with open_channel(frontend.ready["grpc"]) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            request = inference_pb2.GenerateRequest(
                text="hi", sampling=worker_pb2.Sampling(max_tokens=100)
            )
            async with asyncio.timeout(PATIENCE_S):
                nothing = inference_pb2.ListModelsRequest()
                while not (await stub.ListModels(nothing)).models:  # noqa: ASYNC110 - a process
                    await asyncio.sleep(0.05)
            assert text([reply async for reply in stub.Generate(request)]) == LETTERS
        frontend.signal(signal.SIGTERM)
        assert await asyncio.to_thread(frontend.process.wait, PATIENCE_S) == 0


def test_bounds_are_checked() -> None:
    with pytest.raises(BadInput, match="retries"):
        PipelineConfig(retries=-1)
    with pytest.raises(BadInput, match="deadline_ms"):
        PipelineConfig(deadline_ms=0)
