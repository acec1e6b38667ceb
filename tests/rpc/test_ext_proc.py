"""The endpoint picker over real gRPC, spoken to as a proxy does."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.adapters.envoy.messages import DESTINATION, MAX_CHUNK_BYTES, SERVED, SUBSET
from kvstore.adapters.envoy.picker import FAIRNESS, TTFT_SLO, PickerConfig
from kvstore.adapters.envoy.server import READY, ExtProcServer
from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.names import chain, pack_tokens
from kvstore.observe.metrics import exposition
from kvstore.router.members import Member, Members
from kvstore.router.router import RouterConfig
from kvstore.router.server import RouterServer
from kvstore.rpc.channel import open_channel
from kvstore.rpc.envoy import ext_proc_pb2 as wire
from kvstore.rpc.envoy import ext_proc_pb2_grpc
from kvstore.rpc.errors import error_from
from tests.byte_tokenizer import make_byte_tokenizer
from tests.patience import PATIENCE_MS, PATIENCE_S, until
from tests.processes import scripted, started
from tests.scripted_worker import ROOT, ScriptedWorker

DUPLEX = wire.BodySendMode.FULL_DUPLEX_STREAMED
SYSTEM = "You are the librarian of a cache. " * 8
ENDED: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it


class ByteTokens:
    """Every byte is a token."""

    def text(self, text: str) -> Sequence[int]:
        return list(text.encode())

    def conversation(self, turns: Sequence[Any], options: Any) -> Sequence[int]:
        return self.text("".join(turn["content"] for turn in turns))


@dataclass
class Picked:
    """A picker over two workers, and a stub that speaks to it."""

    a: ScriptedWorker
    b: ScriptedWorker
    beside: RouterServer
    server: ExtProcServer
    stub: ext_proc_pb2_grpc.ExternalProcessorStub
    channel: grpc.aio.Channel

    def metric(self, line: str) -> float:
        """Return the value of a sample, 0 where there is none."""
        text = exposition(self.beside.registry)().decode()
        found = [row.rpartition(" ")[2] for row in text.splitlines() if row.startswith(line + " ")]
        return float(found[0]) if found else 0.0


@pytest.fixture
async def picked() -> AsyncIterator[Picked]:
    a, b = ScriptedWorker("a"), ScriptedWorker("b", host="host-b")
    members = Members.of([Member("worker", one.name, await one.start()) for one in (a, b)])
    beside = RouterServer(members, config=RouterConfig(wait_ms=PATIENCE_MS))
    config = PickerConfig(root=ROOT, max_body_bytes=200_000, base_models=frozenset({"m"}))
    server = ExtProcServer(beside, config, ByteTokens())
    await beside.start("127.0.0.1:0")
    await server.start("127.0.0.1:0")
    await until(lambda: all(beside.router.health(name) == "live" for name in "ab"))
    async with open_channel(server.address) as channel:
        stub = ext_proc_pb2_grpc.ExternalProcessorStub(channel)
        yield Picked(a, b, beside, server, stub, channel)
    await server.stop()
    await beside.stop()
    await a.stop()
    await b.stop()


def completion(text: str, **more: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": text} | more).encode()


def headers(
    extra: dict[str, str] | None = None,
    *,
    mode: wire.BodySendMode = DUPLEX,
    answers: wire.BodySendMode = DUPLEX,
    ends: bool = False,
    subset: Sequence[str] | str | None = None,
) -> wire.ProcessingRequest:
    message = wire.ProcessingRequest()
    message.protocol_config.request_body_mode = mode
    message.protocol_config.response_body_mode = answers
    for name, value in {":method": "POST", ":path": "/v1/completions", **(extra or {})}.items():
        message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    message.request_headers.end_of_stream = ends
    if subset is not None:
        space = message.metadata_context.filter_metadata["envoy.lb.subset_hint"]
        if isinstance(subset, str):
            space[SUBSET] = subset
        else:
            space.get_or_create_list(SUBSET).extend(list(subset))
    return message


def body(piece: bytes, *, ends: bool = True) -> wire.ProcessingRequest:
    return wire.ProcessingRequest(request_body=wire.HttpBody(body=piece, end_of_stream=ends))


def destination(answer: wire.ProcessingResponse, kind: str = "request_headers") -> str:
    """Return where a request goes; header and metadata have to agree."""
    assert answer.WhichOneof("response") == kind
    mutation = getattr(answer, kind).response.header_mutation
    (option,) = [one for one in mutation.set_headers if one.header.key == DESTINATION]
    assert option.append_action == wire.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    space: Any = answer.dynamic_metadata["envoy.lb"]
    told = space[DESTINATION]
    assert option.header.raw_value.decode() == told
    return str(told)


async def ask(picked: Picked, first: wire.ProcessingRequest, content: bytes) -> Any:
    """Send a whole request and return its first answer; the exchange then ends."""
    call = picked.stub.Process()
    await call.write(first)
    if first.protocol_config.request_body_mode == DUPLEX:
        await call.write(body(content))
    answer = await call.read()
    await call.done_writing()
    return answer


async def test_a_request_goes_where_its_prefix_is_and_its_body_comes_back(picked: Picked) -> None:
    text = SYSTEM + "x" * 2 * MAX_CHUNK_BYTES
    picked.b.hold(list(chain(ROOT, pack_tokens(text[:256].encode()))))
    await until(lambda: picked.beside.router.view_blocks == 16)
    content = completion(text)
    call = picked.stub.Process()
    await call.write(headers())
    await call.write(body(content[:1_000], ends=False))
    await call.write(body(content[1_000:]))
    assert destination(await call.read()) == picked.b.address
    got, ended = b"", False
    while not ended:
        answer = await call.read()
        piece = answer.request_body.response.body_mutation.streamed_response
        assert 0 < len(piece.body) <= MAX_CHUNK_BYTES
        got, ended = got + piece.body, piece.end_of_stream
    assert got == content
    call.cancel()
    await until(lambda: picked.metric('kvstore_pick_failures_total{reason="gone"}') == 1)
    assert picked.metric('kvstore_picks_total{outcome="picked"}') == 1
    assert picked.metric('kvstore_pick_prompts_total{read="tokens"}') == 1
    await until(lambda: picked.metric("kvstore_pick_exchanges") == 0)


async def test_only_endpoints_of_the_subset_are_picked(picked: Picked) -> None:
    picked.b.hold(list(chain(ROOT, pack_tokens(SYSTEM.encode()))))
    await until(lambda: picked.beside.router.view_blocks > 0)
    content, a, b = completion(SYSTEM), picked.a.address, picked.b.address
    assert destination(await ask(picked, headers(), content)) == b
    for allowed in ([a], [a, "10.0.0.9:1"], f"{a}, 10.0.0.9:1"):
        assert destination(await ask(picked, headers(subset=allowed), content)) == a
    for allowed in ([], ["10.0.0.9:1"]):
        answer = await ask(picked, headers(subset=allowed), content)
        assert answer.immediate_response.status.code == 503
    assert picked.metric('kvstore_picks_total{outcome="none_ready"}') == 2


async def test_nobody_alive_is_503_at_once(picked: Picked) -> None:
    health = health_pb2_grpc.HealthStub(picked.channel)

    async def state(name: str) -> int:
        asked = health_pb2.HealthCheckRequest(service=name)
        return int((await health.Check(asked)).status)

    serving = health_pb2.HealthCheckResponse.SERVING
    for name in READY:
        await until(lambda name=name: _is(state(name), serving))  # type: ignore[misc]
    await picked.a.stop()
    await picked.b.stop()
    await until(lambda: all(picked.beside.router.health(name) != "live" for name in "ab"))
    answer = await ask(picked, headers(), completion("x"))
    assert answer.immediate_response.status.code == 503
    (retry,) = answer.immediate_response.headers.set_headers
    assert (retry.header.key, retry.header.raw_value) == ("retry-after", b"1")
    for name in READY:
        await until(
            lambda name=name: _is(state(name), health_pb2.HealthCheckResponse.NOT_SERVING)  # type: ignore[misc]
        )
    assert await state("liveness") == await state("") == serving


async def _is(found: Any, wanted: int) -> bool:
    return bool(await found == wanted)


async def test_what_cannot_be_answered_in_time_is_429(picked: Picked) -> None:
    first = headers({TTFT_SLO: "1", FAIRNESS: "tenant"})

    async def shed() -> bool:
        answer = await ask(picked, first, completion("y" * 4_000))
        if answer.WhichOneof("response") != "immediate_response":
            return False  # rates that no worker has told yet refuse nobody
        code: int = answer.immediate_response.status.code
        assert code == 429 and answer.immediate_response.headers.set_headers
        return True

    await until(shed)
    assert picked.metric('kvstore_picks_total{outcome="shed"}') == 1


@pytest.mark.parametrize(
    ("bad", "status"),
    [({TTFT_SLO: "soon"}, 400), ({TTFT_SLO: "-1"}, 400), ({FAIRNESS: "x" * 300}, 400), ({}, 413)],
    ids=["slo", "negative slo", "fairness", "size"],
)
async def test_bad_requests_are_answered_for_the_engine(
    picked: Picked, bad: dict[str, str], status: int
) -> None:
    content = completion("z" * (300_000 if status == 413 else 10))
    answer = await ask(picked, headers(bad), content)
    assert answer.immediate_response.status.code == status
    named = next(iter(bad), "200000").encode()
    assert named in answer.immediate_response.body
    assert picked.metric('kvstore_picks_total{outcome="refused"}') == 1


async def test_other_body_modes_are_answered_message_by_message(picked: Picked) -> None:
    picked.b.hold(list(chain(ROOT, pack_tokens(SYSTEM.encode()))))
    await until(lambda: picked.beside.router.view_blocks > 0)
    call = picked.stub.Process()
    await call.write(headers(mode=wire.BodySendMode.BUFFERED))
    first = await call.read()
    assert not first.request_headers.response.header_mutation.set_headers
    await call.write(body(completion(SYSTEM)))
    assert destination(await call.read(), "request_body") == picked.b.address
    call.cancel()
    for mode in (wire.BodySendMode.NONE, wire.BodySendMode.STREAMED):
        call = picked.stub.Process()
        await call.write(headers(mode=mode))
        assert destination(await call.read())
        await call.write(body(completion(SYSTEM)))
        answer = await call.read()
        assert answer.WhichOneof("response") == "request_body"
        assert not answer.request_body.response.HasField("body_mutation")
        call.cancel()
    answer = await ask(picked, headers(mode=wire.BodySendMode.NONE, ends=True), b"")
    assert destination(answer)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(picked, headers(mode=wire.BodySendMode.GRPC), b"")
    assert isinstance(error_from(refused.value), Unsupported)


async def test_trailers_end_a_request_as_well(picked: Picked) -> None:
    call = picked.stub.Process()
    await call.write(headers())
    await call.write(body(completion("x"), ends=False))
    await call.write(wire.ProcessingRequest(request_trailers=wire.HttpTrailers()))
    answers = [await call.read() for _ in range(3)]
    assert destination(answers[0])
    assert not answers[1].request_body.response.body_mutation.streamed_response.end_of_stream
    assert answers[2].WhichOneof("response") == "request_trailers"
    call.cancel()


def reply_headers(status: str, served: str = "", kind: str = "application/json") -> Any:
    message = wire.ProcessingRequest()
    for name, value in ((":status", status), ("content-type", kind)):
        message.response_headers.headers.headers.add(key=name, raw_value=value.encode())
    if served:
        message.metadata_context.filter_metadata["envoy.lb"][SERVED] = served
    return message


def reply(piece: bytes, *, ends: bool) -> wire.ProcessingRequest:
    return wire.ProcessingRequest(response_body=wire.HttpBody(body=piece, end_of_stream=ends))


async def test_an_answer_passes_unchanged_and_teaches(picked: Picked) -> None:
    picked.b.hold(list(chain(ROOT, pack_tokens(SYSTEM.encode()))))
    await until(lambda: picked.beside.router.view_blocks > 0)
    call = picked.stub.Process()
    await call.write(headers())
    await call.write(body(completion(SYSTEM)))
    where = destination(await call.read())
    await call.read()
    await call.write(reply_headers("200", where, "text/event-stream"))
    assert (await call.read()).WhichOneof("response") == "response_headers"
    said = json.dumps({"text": '"cached_tokens": 7'})
    usage = json.dumps({"usage": {"prompt_tokens_details": {"cached_tokens": 208}}})
    pieces = [f"data: {said}\n\n".encode(), f"data: {usage}\n\ndata: [DONE]\n\n".encode()]
    for at, piece in enumerate(pieces):
        await call.write(reply(piece, ends=at == 1))
        back = (await call.read()).response_body.response.body_mutation.streamed_response
        assert (back.body, back.end_of_stream) == (piece, at == 1)
    actual = 'kvstore_routed_hit_tokens_total{kind="actual"}'
    await until(lambda: picked.metric(actual) == 208)
    predicted = (len(SYSTEM) - 1) // 16 * 16
    assert picked.metric('kvstore_routed_hit_tokens_total{kind="predicted"}') == predicted
    assert picked.metric("kvstore_actual_ttft_seconds_count") == 1
    await call.done_writing()
    assert await call.read() is ENDED
    assert not picked.metric('kvstore_pick_failures_total{reason="gone"}')


@pytest.mark.parametrize(
    ("status", "served", "reason"),
    [("503", "", "status"), ("200", "10.0.0.9:1", "moved")],
)
async def test_a_failed_endpoint_is_passed_over_for_a_moment(
    picked: Picked, status: str, served: str, reason: str
) -> None:
    picked.b.hold(list(chain(ROOT, pack_tokens(SYSTEM.encode()))))
    await until(lambda: picked.beside.router.view_blocks > 0)
    call = picked.stub.Process()
    await call.write(headers(answers=wire.BodySendMode.NONE))
    await call.write(body(completion(SYSTEM)))
    assert destination(await call.read()) == picked.b.address
    await call.read()
    await call.write(reply_headers(status, served))
    await call.read()
    await call.done_writing()
    await until(lambda: picked.metric(f'kvstore_pick_failures_total{{reason="{reason}"}}') == 1)
    assert destination(await ask(picked, headers(), completion(SYSTEM))) == picked.a.address


async def test_a_proxy_that_only_watches_gets_no_answer(picked: Picked) -> None:
    call = picked.stub.Process()
    first = headers()
    first.observability_mode = True
    await call.write(first)
    await call.done_writing()
    assert await call.read() is ENDED
    assert not picked.metric('kvstore_picks_total{outcome="picked"}')


async def test_members_that_a_proxy_cannot_reach_are_refused() -> None:
    members = Members.of([Member("worker", "w", "unix:/tmp/w.sock")])
    beside = RouterServer(members)
    await beside.start("127.0.0.1:0")
    server = ExtProcServer(beside, PickerConfig(root=ROOT))
    with pytest.raises(BadInput, match="w is at unix:"):
        await server.start("127.0.0.1:0")
    await beside.stop()


async def test_the_command_picks_by_the_models_own_tokens(tmp_path: Path) -> None:
    model = make_byte_tokenizer(tmp_path)
    with scripted("a", "--hold", "4") as a, scripted("b") as b:
        arguments = ["-m", "kvstore.cli.main", "router", "--json", "--metrics", "127.0.0.1:0"]
        arguments += ["--worker", f"b={b.ready['address']}", "--worker", f"a={a.ready['address']}"]
        arguments += ["--ext-proc", "127.0.0.1:0", "--tokenizer", str(model), "--fallbacks", "1"]
        arguments += ["--vllm-root", ROOT.hex()]
        with started(arguments) as router:
            async with open_channel(router.ready["ext_proc"]) as channel:
                stub = ext_proc_pb2_grpc.ExternalProcessorStub(channel)
                content = completion(bytes(range(65)).decode())

                async def picked() -> list[str]:
                    call = stub.Process(wait_for_ready=True)
                    await call.write(headers())
                    await call.write(body(content))
                    answer = await call.read()
                    call.cancel()
                    if answer.WhichOneof("response") == "immediate_response":
                        return []
                    return destination(answer).split(",")

                both = [a.ready["address"], b.ready["address"]]
                await until(lambda: _same(picked(), both), seconds=30)
            url = f"http://{router.ready['metrics']}/metrics"
            async with httpx.AsyncClient(trust_env=False) as http:
                assert 'kvstore_picks_total{outcome="picked"}' in (await http.get(url)).text
            router.signal(signal.SIGTERM)
            assert await asyncio.to_thread(router.process.wait, PATIENCE_S) == 0


async def _same(found: Any, wanted: list[str]) -> bool:
    return bool(await found == wanted)
