"""One HTTP request and its response, as a proxy tells of them.

    request headers ─▶ body … end ─▶ (pick) ─▶ headers + destination, body given back
    response headers ─▶ body … end ─▶ (what the cache gave) ─▶ booking freed

In full duplex the proxy lets nothing go on before it is given back, so a request's headers are
held until its body was read. In the other modes each message has one answer, at once.
"""

from collections.abc import Callable, Iterator
from time import perf_counter

from kvstore.adapters.envoy import messages
from kvstore.adapters.envoy.answers import AnswerTail
from kvstore.adapters.envoy.picker import Denial, Pick, Picker
from kvstore.core.errors import Unsupported
from kvstore.rpc.envoy import ext_proc_pb2 as wire

_DUPLEX = wire.BodySendMode.FULL_DUPLEX_STREAMED
_WHOLE = (wire.BodySendMode.BUFFERED, wire.BodySendMode.BUFFERED_PARTIAL)
_READS_BODY = (_DUPLEX, *_WHOLE)
Responses = Iterator[wire.ProcessingResponse] | list[wire.ProcessingResponse]


class Exchange:
    """Hears messages in order and says what answers them. `end` when the stream is over."""

    def __init__(self, picker: Picker, *, clock_s: Callable[[], float] = perf_counter) -> None:
        self._picker = picker
        self._clock_s = clock_s
        self._request_mode: int = _DUPLEX
        self._response_mode: int = _DUPLEX
        self._headers: dict[str, str] = {}
        self._subset: frozenset[str] | None = None
        self._body = bytearray()
        self._held = False
        """Whether the answer to the headers still waits for the body."""
        self._pick: Pick | None = None
        self._settled = False
        self._streams = False
        self._first_s = 0.0
        self._tail = AnswerTail()
        self.over = False
        """Whether nothing more is to be said."""

    async def hear(self, message: wire.ProcessingRequest) -> Responses:
        """Return what answers a message; raises `Unsupported` for a mode that cannot be served."""
        if message.HasField("protocol_config"):
            self._request_mode = message.protocol_config.request_body_mode
            self._response_mode = message.protocol_config.response_body_mode
            if wire.BodySendMode.GRPC in (self._request_mode, self._response_mode):
                raise Unsupported("body mode GRPC: an endpoint picker reads HTTP requests")
        if message.observability_mode or self.over:
            return []
        match message.WhichOneof("request"):
            case "request_headers":
                return await self._request_headers(message)
            case "request_body":
                return await self._request_body(message.request_body)
            case "request_trailers":
                return await self._request_trailers()
            case "response_headers":
                return self._response_headers(message)
            case "response_body":
                return self._response_body(message.response_body)
            case "response_trailers":
                self._answered()
                return [messages.plain("response_trailers")]
        return []

    def end(self) -> None:
        """Free what is still booked: the stream is over, whoever ended it."""
        if self._pick is not None and not self._settled:
            if self._first_s:
                self._answered()
            else:
                self._settled = True
                self._picker.failed(self._pick, "gone")

    async def _request_headers(self, message: wire.ProcessingRequest) -> Responses:
        self._headers = messages.headers_of(message.request_headers)
        self._subset = messages.subset_of(message)
        if message.request_headers.end_of_stream or self._request_mode not in _READS_BODY:
            return await self._picked(messages.request_headers)
        if self._request_mode in _WHOLE:
            return [messages.request_headers()]
        self._held = True
        return []

    async def _request_body(self, message: wire.HttpBody) -> Responses:
        if self._pick is not None:
            return [messages.request_body()]
        self._body += message.body
        if len(self._body) > self._picker.config.max_body_bytes:
            return self._denied(self._picker.too_large())
        if not self._held:
            return await self._picked(messages.request_body)
        return await self._given_back(ends=True) if message.end_of_stream else []

    async def _request_trailers(self) -> Responses:
        trailers = messages.plain("request_trailers")
        if not self._held:
            return [trailers]
        answers = await self._given_back(ends=False)
        return answers if self.over else [*answers, trailers]

    async def _given_back(self, *, ends: bool) -> Responses:
        """Return the held headers with their destination, and the whole body behind them."""
        self._held = False
        body = bytes(self._body)
        answers = await self._picked(messages.request_headers)
        if self.over:
            return answers
        self._body.clear()
        return [*answers, *messages.request_pieces(body, ends=ends)]

    async def _picked(self, say: Callable[..., wire.ProcessingResponse]) -> Responses:
        picked = await self._picker.pick(self._headers, bytes(self._body), self._subset)
        if isinstance(picked, Denial):
            return self._denied(picked)
        self._pick = picked
        return [say(picked.endpoints)]

    def _denied(self, denial: Denial) -> Responses:
        self.over = True
        self._body.clear()
        extra = messages.retry_after(denial.retry_after_ms) if denial.retry_after_ms else {}
        return [messages.denial(denial.status, denial.message, extra)]

    def _response_headers(self, message: wire.ProcessingRequest) -> Responses:
        headers = messages.headers_of(message.response_headers)
        self._streams = "text/event-stream" in headers.get("content-type", "")
        self._first_s = self._clock_s()
        served = messages.served_of(message)
        if self._pick is not None and not self._settled:
            if served and served != self._pick.endpoints[0]:
                self._fail("moved")
            elif headers.get(":status", "").startswith("5"):
                self._fail("status")
            elif message.response_headers.end_of_stream:
                self._answered()
        return [messages.plain("response_headers")]

    def _response_body(self, message: wire.HttpBody) -> Responses:
        if message.body and not self._tail.size and self._pick is not None and not self._settled:
            self._first_s = self._clock_s()
            self._picker.first_token(self._pick)
        self._tail.add(message.body)
        if message.end_of_stream:
            self._answered()
        return messages.response_body(message, give_back=self._response_mode == _DUPLEX)

    def _fail(self, reason: str) -> None:
        assert self._pick is not None
        self._settled = True
        self._picker.failed(self._pick, reason)

    def _answered(self) -> None:
        if self._pick is None or self._settled:
            return
        self._settled = True
        # A body that came in one piece says when all was done, not when the first token was.
        ttft_ms = (self._first_s - self._pick.made_s) * 1_000 if self._streams else 0.0
        cached = self._tail.cached_tokens()
        self._picker.answered(self._pick, cached_tokens=cached, ttft_ms=max(0.0, ttft_ms))
