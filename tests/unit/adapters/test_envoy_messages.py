"""What passes between proxy and picker, without either."""

import pytest

from kvstore.adapters.envoy.answers import TAIL_BYTES, AnswerTail
from kvstore.adapters.envoy.exchange import Exchange
from kvstore.adapters.envoy.messages import (
    MAX_CHUNK_BYTES,
    denial,
    headers_of,
    request_pieces,
    response_body,
    retry_after,
)
from kvstore.adapters.envoy.picker import PickerConfig
from kvstore.cli.ext_proc import ExtProcOptions
from kvstore.core.errors import BadInput
from kvstore.core.names import Root
from kvstore.rpc.envoy import ext_proc_pb2 as wire
from kvstore.rpc.security import SecurityConfig

ROOT = Root(bytes(32))


@pytest.mark.parametrize("size", [0, 1, MAX_CHUNK_BYTES, MAX_CHUNK_BYTES + 1, 3 * MAX_CHUNK_BYTES])
@pytest.mark.parametrize("ends", [True, False])
def test_bodies_come_back_whole_in_pieces_that_fit(size: int, ends: bool) -> None:
    content = bytes(at % 251 for at in range(size))
    request = [
        one.request_body.response.body_mutation.streamed_response
        for one in request_pieces(content, ends=ends)
    ]
    message = wire.HttpBody(body=content, end_of_stream=ends)
    response = [
        one.response_body.response.body_mutation.streamed_response
        for one in response_body(message, give_back=True)
    ]
    for pieces in (request, response):
        assert b"".join(piece.body for piece in pieces) == content
        assert max(len(piece.body) for piece in pieces) <= MAX_CHUNK_BYTES
        assert [piece.end_of_stream for piece in pieces] == [False] * (len(pieces) - 1) + [ends]


def test_the_wire_is_envoys() -> None:
    """The bytes were written by classes made from Envoy's own schema (envoy-data-plane 2.2.0)."""
    theirs = "12170a130a110a053a706174681a082f76312f6368617418015a0408041004"
    request = wire.ProcessingRequest.FromString(bytes.fromhex(theirs))
    assert headers_of(request.request_headers) == {":path": "/v1/chat"}
    assert request.request_headers.end_of_stream
    duplex = wire.BodySendMode.FULL_DUPLEX_STREAMED
    assert request.protocol_config.request_body_mode == duplex
    assert request.protocol_config.response_body_mode == duplex
    theirs = (
        "3a3a0a0308f70312160a140a100a0b72657472792d61667465721a013118021a026e6f"
        "2a176b7673746f72655f656e64706f696e745f7069636b6572"
    )
    assert denial(503, "no", {"retry-after": "1"}).SerializeToString().hex() == theirs


def test_headers_come_as_text_or_as_bytes() -> None:
    message = wire.HttpHeaders()
    message.headers.headers.add(key="X-A", value="1")
    message.headers.headers.add(key="x-b", raw_value=b"\xff2")
    assert headers_of(message) == {"x-a": "1", "x-b": "\xff2"}


def test_retry_after_is_in_whole_seconds() -> None:
    assert [retry_after(ms)["retry-after"] for ms in (1, 1_000, 1_001)] == ["1", "1", "2"]


def test_only_the_engines_own_count_is_read_from_an_answer() -> None:
    tail = AnswerTail()
    assert tail.cached_tokens() is None
    tail.add(b'{"text": "\\"cached_tokens\\": 9"}')
    assert tail.cached_tokens() is None
    tail.add(b'{"usage": {"cached_to')
    tail.add(b'kens" : 32}}')
    assert tail.cached_tokens() == 32
    tail.add(bytes(TAIL_BYTES))
    assert tail.cached_tokens() is None and tail.size > TAIL_BYTES


@pytest.mark.parametrize(
    "bad", [{"fallbacks": 17}, {"fallbacks": -1}, {"patience_ms": 0}, {"max_body_bytes": 0}]
)
def test_settings_are_checked(bad: dict[str, int]) -> None:
    with pytest.raises(BadInput, match=next(iter(bad))):
        PickerConfig(root=ROOT, **bad)  # type: ignore[arg-type]


def test_beyond_loopback_the_port_needs_identities() -> None:
    options = ExtProcOptions("0.0.0.0:9002", None, frozenset(), 0, 1.0, 1)
    with pytest.raises(BadInput, match="--ext-proc"):
        options.check(SecurityConfig())


async def test_an_exchange_that_said_nothing_frees_nothing() -> None:
    exchange = Exchange(picker=None)  # type: ignore[arg-type]
    assert await exchange.hear(wire.ProcessingRequest()) == []
    exchange.end()
    assert not exchange.over
