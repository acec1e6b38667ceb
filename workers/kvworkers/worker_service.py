"""The gRPC face of a worker: checks every field, runs requests, serves its events.

What a caller sends can be anything; nothing reaches the engine unchecked, and every refusal is a
typed error that names the field.
"""

from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Final

import grpc.aio

from kvstore.core.errors import BadInput, Forbidden, Refused, TooLarge, Unsupported
from kvstore.core.limits import MAX_DEADLINE_MS, MAX_ID_BYTES, MAX_PROMPT_TOKENS
from kvstore.core.names import Root, pack_tokens
from kvstore.directory.events import TierKind, WorkerRole
from kvstore.directory.publisher import Publisher
from kvstore.observe.tracing import OFF, Span, Tracing, from_metadata
from kvstore.rpc.convert import check_id, namespace_to_proto
from kvstore.rpc.v1 import types_pb2, watch_pb2, worker_pb2, worker_pb2_grpc
from kvstore.rpc.watch_server import serve_watch
from kvworkers.engine.engine import Engine
from kvworkers.engine.grammar import Following, Grammars
from kvworkers.engine.handover import HandOver
from kvworkers.engine.output import FirstTokens, Output
from kvworkers.engine.sampling import Constraint, SamplingParams
from kvworkers.engine.sequence import CacheUse, Request
from kvworkers.models.spec import ModelSpec

SERVICE_NAME: Final = "kvstore.rpc.v1.Worker"
"""What the health service calls this."""

SETTLE_MS: Final = 1_000
"""How long the end of a prompt that goes on elsewhere waits for its blocks to be in the store: then
whoever goes on computes what has not come."""

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerIdentity:
    """Who a worker says it is."""

    name: str
    incarnation: int
    host: str
    """Who shares an arena: the cache node's name."""
    share_domain: str
    device: str
    role: WorkerRole = WorkerRole.BOTH


class WorkerService(worker_pb2_grpc.WorkerServicer):  # type: ignore[misc]
    """Serves one engine."""

    def __init__(self, worker: "WorkerState") -> None:
        self._worker = worker

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: Context
    ) -> worker_pb2.DescribeReply:
        """Say who this is and under which root it names blocks."""
        worker = self._worker
        identity, spec = worker.identity, worker.spec
        _check_domain(request.share_domain, identity.share_domain)
        return worker_pb2.DescribeReply(
            worker=identity.name,
            incarnation=identity.incarnation,
            host=identity.host,
            model=spec.name,
            namespace=namespace_to_proto(spec.namespace),
            root=worker.root(),
            block_bytes=spec.layout.block_bytes,
            max_model_tokens=spec.max_model_tokens,
            kv_capacity_tokens=worker.capacity_tokens,
            role=identity.role,
            device=identity.device,
        )

    async def Run(
        self, request: worker_pb2.RunRequest, context: Context
    ) -> AsyncIterator[worker_pb2.RunReply]:
        """Run one request and stream its tokens."""
        worker = self._worker
        _check_domain(request.share_domain, worker.identity.share_domain)
        if worker.identity.role is WorkerRole.PREFILL and request.sampling.max_tokens > 1:
            # Whoever knows roles does not ask; it may have asked before it heard of this one.
            raise Refused("a worker of role prefill gives first tokens only")
        parent = from_metadata(dict(context.invocation_metadata() or ()))
        with worker.tracing.begin("worker", parent, request=request.request_id) as span:
            following = await _following(request, worker.grammars)
            checked = request_from_wire(
                request,
                vocab_size=worker.spec.vocab_size,
                constraint=following,
                traceparent=span.traceparent,
            )
            async with aclosing(worker.engine.generate(checked)) as outputs:
                async for output in outputs:
                    if output.first is not None:
                        _note_first(span, output.first)
                    if output.finish is not None and following is not None and following.error:
                        # Not an end of the reply: what does not follow must not pass for it.
                        raise Unsupported(f"grammar: {following.error}")
                    if output.finish is not None and checked.hand_over is not None:
                        # Tokens are not kept back for what others want of the store.
                        yield reply_of(replace(output, finish=None), host=worker.identity.host)
                        if not await checked.hand_over.settled(deadline_ms=SETTLE_MS):
                            worker.late()
                        output = Output(finish=output.finish)
                    yield reply_of(output, host=worker.identity.host)

    async def Watch(
        self, request: watch_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[watch_pb2.WatchReply]:
        """Stream what this worker's pages hold, and its load with every mark."""
        async for reply in serve_watch(self._worker.publisher, request):
            yield reply


class WorkerState:
    """What the service needs of a running worker."""

    def __init__(
        self,
        identity: WorkerIdentity,
        spec: ModelSpec,
        engine: Engine,
        publisher: Publisher,
        *,
        capacity_tokens: int,
        tracing: Tracing = OFF,
        late: Callable[[], object],
    ) -> None:
        """`late` is told of a hand-over whose blocks were not stored in time."""
        self.identity = identity
        self.spec = spec
        self.engine = engine
        self.publisher = publisher
        self.capacity_tokens = capacity_tokens
        self.tracing = tracing
        self.late = late
        self.grammars = Grammars(
            spec.path, vocab_size=spec.vocab_size, eos_token_ids=spec.eos_token_ids
        )

    def root(self) -> Root:
        """Return the root that new requests are named under."""
        return self.engine.root()


async def _following(message: worker_pb2.RunRequest, grammars: Grammars) -> Following | None:
    """Return where a reply stands in its grammar; None for one that has none."""
    if not message.sampling.grammar:
        return None
    if message.sampling.ignore_eos:
        raise BadInput("ignore_eos with a grammar: its end could not be said")
    return await grammars.follow(message.sampling.grammar, _said(message))


def _said(message: worker_pb2.RunRequest) -> tuple[int, ...]:
    """Return the tokens of the reply that a prompt ends with."""
    if message.reply_tokens > len(message.tokens) // 4:
        raise BadInput(f"reply_tokens {message.reply_tokens} is over the number of tokens")
    return tuple(array("I", message.tokens[len(message.tokens) - 4 * message.reply_tokens :]))


def request_from_wire(
    message: worker_pb2.RunRequest,
    *,
    vocab_size: int = 1 << 32,
    constraint: Constraint | None = None,
    traceparent: str = "",
) -> Request:
    """Return the checked request; raises `BadInput` or `TooLarge` naming the field at fault."""
    check_id(message.request_id, "request_id")
    if len(message.tokens) // 4 > MAX_PROMPT_TOKENS:
        raise TooLarge(f"{len(message.tokens) // 4} tokens; {MAX_PROMPT_TOKENS} allowed")
    if message.deadline_ms > MAX_DEADLINE_MS:
        raise BadInput(f"deadline_ms is {message.deadline_ms}; {MAX_DEADLINE_MS} allowed")
    if message.hand_over and (message.no_store or message.no_read):
        raise BadInput("hand_over excludes no_store and no_read: blocks go through the store")
    return Request(
        request_id=message.request_id,
        tokens=message.tokens,
        sampling=sampling_from_wire(
            message.sampling, vocab_size=vocab_size, said=_said(message), constraint=constraint
        ),
        no_store=message.no_store,
        kind=message.kind,
        no_read=message.no_read,
        cache_salt=message.cache_salt,
        deadline_ms=message.deadline_ms,
        traceparent=traceparent,
        siblings=message.siblings,
        hand_over=HandOver() if message.hand_over else None,
    )


def sampling_from_wire(
    message: worker_pb2.Sampling,
    *,
    vocab_size: int = 1 << 32,
    said: tuple[int, ...] = (),
    constraint: Constraint | None = None,
) -> SamplingParams:
    """Return checked sampling parameters; the wire's zero of `top_p` means 1."""
    if (worst := max(message.logit_bias, default=0)) >= vocab_size:
        raise BadInput(f"logit_bias: token id {worst} is outside the vocabulary of {vocab_size}")
    return SamplingParams(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_p=1.0 if message.top_p == 0 else message.top_p,
        top_k=message.top_k,
        seed=message.seed if message.has_seed else None,
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        min_p=message.min_p,
        logit_bias=tuple(message.logit_bias.items()),
        said=said,
        constraint=constraint,
    )


def reply_of(output: Output, *, host: str) -> worker_pb2.RunReply:
    """Return the wire form of one output."""
    reply = worker_pb2.RunReply(tokens=pack_tokens(output.tokens))
    for entry in output.logprobs:
        reply.logprobs.add(token_ids=entry.token_ids, logprobs=entry.values)
    if output.first is not None:
        _add_first(reply, output.first, host)
    if output.finish is not None:
        reply.finish_reason = output.finish.value
    return reply


def _add_first(reply: worker_pb2.RunReply, first: FirstTokens, host: str) -> None:
    reply.cache.CopyFrom(report_of(first.cache, host=host))
    reply.ttft_ms = first.ttft_ms
    reply.queue_ms = first.queue_ms
    reply.load_ms = first.load_ms


def _note_first(span: Span, first: FirstTokens) -> None:
    """Say in a span how a prompt fared until its first token."""
    span.set(
        ttft_ms=first.ttft_ms,
        queue_ms=first.queue_ms,
        load_ms=first.load_ms,
        hbm_tokens=first.cache.hbm_tokens,
        loaded_tokens=sum(first.cache.loaded_tokens.values()),
        computed_tokens=first.cache.computed_tokens,
        miss_reason=first.cache.miss_reason.name.lower(),
    )


def report_of(use: CacheUse, *, host: str) -> types_pb2.CacheReport:
    """Return the account of a prompt: its parts add up to `prompt_tokens`."""
    loaded = use.loaded_tokens
    return types_pb2.CacheReport(
        prompt_tokens=use.prompt_tokens,
        hbm_tokens=use.hbm_tokens,
        dram_tokens=loaded.get(TierKind.DRAM, 0),
        nvme_tokens=loaded.get(TierKind.NVME, 0),
        peer_tokens=loaded.get(TierKind.PEER, 0),
        files_tokens=loaded.get(TierKind.FILES, 0),
        computed_tokens=use.computed_tokens,
        miss_reason=types_pb2.MissReason.Name(int(use.miss_reason)),
        places=host if loaded else "",
    )


def _check_domain(asked: str, served: str) -> None:
    if len(asked.encode()) > MAX_ID_BYTES:
        raise TooLarge(f"share_domain is over {MAX_ID_BYTES} bytes")
    if asked and asked != served:
        raise Forbidden(f"this worker does not serve share domain {asked!r}")
