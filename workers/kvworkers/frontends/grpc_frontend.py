"""The gRPC service that users call: `Inference`."""

import uuid
from array import array
from collections.abc import AsyncIterator
from contextlib import aclosing

from pydantic_core import from_json

from kvstore.core.errors import BadInput, TooLarge
from kvstore.core.limits import MAX_PROMPT_TOKENS
from kvstore.rpc.convert import check_id
from kvstore.rpc.gate import identify
from kvstore.rpc.identity import Identity
from kvstore.rpc.interceptors import Context
from kvstore.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from kvworkers.frontends.door import Door
from kvworkers.frontends.generation import Chunk, FieldError, Generation, SamplingChoice, Shape
from kvworkers.frontends.grammars import json_shape
from kvworkers.frontends.messages import Message
from kvworkers.frontends.pipeline import Pipeline
from kvworkers.frontends.tenancy import for_tenant


class InferenceServicer(inference_pb2_grpc.InferenceServicer):  # type: ignore[misc]
    """Generate and ListModels over the pipeline."""

    def __init__(
        self, pipeline: Pipeline, *, created: int, identity: Identity, apart: bool, door: Door
    ) -> None:
        self._door = door
        self._identity = identity
        self._apart = apart
        self._pipeline = pipeline
        self._created = created

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateReply]:
        """Stream the reply; a caller that cancels frees the worker."""
        caller = identify(self._identity, context)
        with self._door.inside():
            running = await self._pipeline.prepare(
                for_tenant(generation_of(request), caller, apart=self._apart)
            )
            async with aclosing(self._pipeline.run(running)) as chunks:
                async for chunk in chunks:
                    yield reply_of(chunk)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsReply:
        """List what the live workers serve."""
        reply = inference_pb2.ListModelsReply()
        for offer in self._pipeline.fleet.offers().values():
            reply.models.add(
                id=offer.model, max_model_tokens=offer.max_model_tokens, created=self._created
            )
        return reply


def generation_of(request: inference_pb2.GenerateRequest) -> Generation:
    """Return the request that a message asks for; raises `BadInput` naming a field."""
    messages: list[Message] | None = None
    text: str | None = None
    tokens: array[int] | None = None
    match request.WhichOneof("prompt"):
        case "messages":
            messages = [Message(one.role, one.content) for one in request.messages.messages]
        case "text":
            text = request.text
        case "tokens":
            tokens = _tokens(request.tokens.packed)
        case _:
            raise BadInput("give exactly one of messages, text and tokens")
    return Generation(
        request_id=uuid.uuid4().hex,
        model=check_id(request.model, "model"),
        messages=messages,
        text=text,
        tokens=tokens,
        sampling=_sampling(request.sampling, prefill_only=request.prefill_only),
        shape=_shape(request),
        stop=tuple(request.stop),
        no_store=request.no_store,
        kind=request.kind,
        no_read=request.no_read,
        cache_salt=request.cache_salt.encode(),
        deadline_ms=request.deadline_ms,
        priority=request.priority,
    )


def reply_of(chunk: Chunk) -> inference_pb2.GenerateReply:
    """Return the wire form of a chunk."""
    reply = inference_pb2.GenerateReply(
        text=chunk.text,
        tokens=array("I", chunk.tokens).tobytes(),
        finish_reason=chunk.finish_reason,
        ttft_ms=chunk.ttft_ms,
        worker=chunk.worker,
        prefill_worker=chunk.prefill_worker,
        output_tokens=chunk.output_tokens,
        retries=chunk.retries,
    )
    if chunk.cache is not None:
        reply.cache.CopyFrom(chunk.cache.to_proto())
    for chance in chunk.chances:
        reply.logprobs.add(
            token_ids=[token for token, _ in chance.top],
            logprobs=[logprob for _, logprob in chance.top],
        )
    return reply


def _tokens(packed: bytes) -> "array[int]":
    if len(packed) % 4:
        raise BadInput(f"packed tokens have {len(packed)} bytes, not a multiple of 4")
    if len(packed) // 4 > MAX_PROMPT_TOKENS:
        raise TooLarge(f"{len(packed) // 4} tokens; {MAX_PROMPT_TOKENS} allowed")
    return array("I", packed)


def _shape(request: inference_pb2.GenerateRequest) -> Shape | None:
    """Return what the reply has to follow; raises `FieldError` for two things at once."""
    if request.json_schema and request.sampling.grammar:
        raise FieldError("give one of json_schema and sampling.grammar", "json_schema")
    if request.sampling.grammar:
        return Shape(request.sampling.grammar, place="sampling.grammar")
    if not request.json_schema:
        return None
    try:
        # Unlike `json.loads` it refuses what is nested without end.
        schema = from_json(request.json_schema, allow_inf_nan=False)
    except ValueError as error:
        raise FieldError(f"json_schema is no JSON: {error}", "json_schema") from None
    return json_shape(schema, "json_schema")


def _sampling(sampling: worker_pb2.Sampling, *, prefill_only: bool) -> SamplingChoice:
    """Return the choice in a message, where 0 stands for what was not said."""
    return SamplingChoice(
        max_tokens=0 if prefill_only else sampling.max_tokens or None,
        temperature=sampling.temperature,
        top_p=sampling.top_p or 1.0,
        top_k=sampling.top_k,
        seed=sampling.seed if sampling.has_seed else None,
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        min_p=sampling.min_p,
        logit_bias=tuple(sampling.logit_bias.items()),
    )
