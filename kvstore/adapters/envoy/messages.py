"""What a picker says to a proxy, and how it reads what the proxy said. Pure."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from google.protobuf.struct_pb2 import Value

from kvstore.rpc.envoy import ext_proc_pb2 as wire

DESTINATION: Final = "x-gateway-destination-endpoint"
"""Header, and key of the dynamic metadata, that name where a request goes: the same in both."""
SUBSET: Final = f"{DESTINATION}-subset"
SERVED: Final = f"{DESTINATION}-served"
PICKED_SPACE: Final = "envoy.lb"
SUBSET_SPACE: Final = "envoy.lb.subset_hint"

MAX_CHUNK_BYTES: Final = 62_000
"""A piece of a body given back: the proxy refuses messages of more than 64 KiB."""

MAX_HEADERS: Final = 256
"""Headers read of one request; proxies allow 100 by default."""


def headers_of(message: wire.HttpHeaders) -> dict[str, str]:
    """Return headers by their lower-case names; of one given twice the last."""
    return {
        header.key.lower(): header.raw_value.decode("latin-1") if header.raw_value else header.value
        for header in message.headers.headers[:MAX_HEADERS]
    }


def subset_of(message: wire.ProcessingRequest) -> frozenset[str] | None:
    """Return the endpoints that the proxy allows; None where it allows every one."""
    space = message.metadata_context.filter_metadata.get(SUBSET_SPACE)
    if space is None or SUBSET not in space.fields:
        return None
    value = space.fields[SUBSET]
    found = value.list_value.values if value.HasField("list_value") else [value]
    return frozenset(name for one in found for name in _addresses(one))


def served_of(message: wire.ProcessingRequest) -> str:
    """Return the endpoint that answered; empty where the proxy does not tell."""
    space = message.metadata_context.filter_metadata.get(PICKED_SPACE)
    if space is None or SERVED not in space.fields:
        return ""
    return space.fields[SERVED].string_value.strip()


def _addresses(value: Value) -> Iterator[str]:
    return (part.strip() for part in value.string_value.split(",") if part.strip())


def with_destination(
    response: wire.ProcessingResponse, common: wire.CommonResponse, endpoints: Sequence[str]
) -> None:
    """Say where a request goes, in header and metadata; the first endpoint is preferred."""
    value = ",".join(endpoints)
    # What routes on the header has to look at it again.
    common.clear_route_cache = True
    _set(common.header_mutation, DESTINATION, value)
    response.dynamic_metadata.get_or_create_struct(PICKED_SPACE)[DESTINATION] = value


def denial(status: int, message: str, headers: Mapping[str, str]) -> wire.ProcessingResponse:
    """Return an answer that the proxy gives in the engine's place."""
    response = wire.ProcessingResponse()
    answer = response.immediate_response
    answer.status.code = status
    answer.body = message.encode()
    answer.details = "kvstore_endpoint_picker"
    for name, value in headers.items():
        _set(answer.headers, name, value)
    return response


def retry_after(retry_after_ms: int) -> dict[str, str]:
    """Return the header that says when to come again, in whole seconds."""
    return {"retry-after": str(max(1, math.ceil(retry_after_ms / 1_000)))}


def request_headers(endpoints: Sequence[str] = ()) -> wire.ProcessingResponse:
    """Return the answer to a request's headers, with its destination where that is known."""
    response = wire.ProcessingResponse()
    response.request_headers.response.SetInParent()
    if endpoints:
        with_destination(response, response.request_headers.response, endpoints)
    return response


def request_body(endpoints: Sequence[str] = ()) -> wire.ProcessingResponse:
    """Return the answer to a body that the proxy keeps itself."""
    response = wire.ProcessingResponse()
    response.request_body.response.SetInParent()
    if endpoints:
        with_destination(response, response.request_body.response, endpoints)
    return response


def request_pieces(body: bytes, *, ends: bool) -> Iterator[wire.ProcessingResponse]:
    """Yield a body as it is given back in full duplex; `ends`: no trailers follow."""
    for start in range(0, max(1, len(body)), MAX_CHUNK_BYTES):
        response = wire.ProcessingResponse()
        piece = response.request_body.response.body_mutation.streamed_response
        piece.body = body[start : start + MAX_CHUNK_BYTES]
        piece.end_of_stream = ends and start + MAX_CHUNK_BYTES >= len(body)
        yield response


def response_body(message: wire.HttpBody, *, give_back: bool) -> Iterator[wire.ProcessingResponse]:
    """Yield what lets a piece of an answer go on, unchanged."""
    if not give_back:
        response = wire.ProcessingResponse()
        response.response_body.response.SetInParent()
        yield response
        return
    body = message.body
    for start in range(0, max(1, len(body)), MAX_CHUNK_BYTES):
        response = wire.ProcessingResponse()
        piece = response.response_body.response.body_mutation.streamed_response
        piece.body = body[start : start + MAX_CHUNK_BYTES]
        piece.end_of_stream = message.end_of_stream and start + MAX_CHUNK_BYTES >= len(body)
        yield response


def plain(kind: str) -> wire.ProcessingResponse:
    """Return an answer of a kind that changes nothing: `response_headers`, trailers."""
    response = wire.ProcessingResponse()
    getattr(response, kind).SetInParent()
    return response


def _set(mutation: wire.HeaderMutation, name: str, value: str) -> None:
    option = mutation.set_headers.add()
    option.header.key = name
    option.header.raw_value = value.encode()
    option.append_action = wire.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
