"""Server interceptors: every handler may raise our errors; callers get their status codes."""

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import grpc.aio
from google.protobuf.message import DecodeError

from kvstore.core.errors import BadInput, KvStoreError, Unsupported
from kvstore.rpc.errors import status_of
from kvstore.rpc.gate import Gate

_log = logging.getLogger(__name__)

if TYPE_CHECKING:  # generic in the type stubs only
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Handler = grpc.RpcMethodHandler
    Context = grpc.aio.ServicerContext


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets callers in by the gate, and turns `KvStoreError` into its status.

    Anything else is logged and becomes INTERNAL. Without a gate everyone may call everything.

    The caller of an unexpected failure sees no detail of it: messages of foreign exceptions can
    carry other tenants' data.
    """

    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate
        self._guarded: dict[str, tuple[Handler, Handler]] = {}
        """Method → its handler and the guarded one: as many as are served."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the handler that `continuation` finds."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        known = self._guarded.get(method)
        if known is not None and known[0] is handler:
            return known[1]
        guarded = self._guard(handler, method)
        if guarded is not handler:
            self._guarded[method] = handler, guarded
        return guarded

    def _guard(self, handler: Handler, method: str) -> Handler:
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            inner = getattr(handler, kind, None)
            if inner is not None:
                wrap = getattr(grpc, f"{kind}_rpc_method_handler")
                decode = handler.request_deserializer
                single = kind.startswith("unary")
                if single and decode is not None:
                    inner, decode = _decoding(inner, decode), None
                guarded: Handler = wrap(
                    _guard(inner, method, self._gate),
                    request_deserializer=decode,
                    response_serializer=handler.response_serializer,
                )
                return guarded
        return handler


def _decoding(inner: Callable[..., Any], decode: Callable[[bytes], Any]) -> Callable[..., Any]:
    """Return a handler of raw bytes.

    grpc answers bytes that are no message with UNKNOWN and a traceback in the server's log;
    decoding inside the guard makes them the caller's mistake that they are.
    """

    def decoded(raw: bytes) -> Any:
        try:
            return decode(raw)
        except DecodeError as error:
            raise BadInput(f"the request is not a message of its type: {error}") from error

    async def single(raw: bytes, context: Context) -> Any:
        answer = inner(decoded(raw), context)
        return await answer if inspect.isawaitable(answer) else answer

    async def streaming(raw: bytes, context: Context) -> AsyncIterator[Any]:
        async for reply in inner(decoded(raw), context):
            yield reply

    return streaming if inspect.isasyncgenfunction(inner) else single


def _guard(inner: Callable[..., Any], method: str, gate: Gate | None) -> Callable[..., Any]:
    """Return a handler like `inner` whose failures become statuses.

    A streaming handler is an async generator, or a coroutine that writes to its context (the
    standard health service does so); each has to stay what it is.
    """

    def admitted(request: Any, context: Context) -> AbstractContextManager[None]:
        if gate is None:
            return nullcontext()
        # Before a message is decoded, so what strangers send is never looked at.
        size = len(request) if isinstance(request, bytes) else 0
        return gate.admitted(method, context, size)

    async def single(request: Any, context: Context) -> Any:
        try:
            with admitted(request, context):
                answer = inner(request, context)
                return await answer if inspect.isawaitable(answer) else answer
        except BaseException as failure:
            await _fail(failure, method, context)
            raise

    async def streaming(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            with admitted(request, context):
                async for reply in inner(request, context):
                    yield reply
        except GeneratorExit:
            raise
        except BaseException as failure:
            await _fail(failure, method, context)
            raise

    return streaming if inspect.isasyncgenfunction(inner) else single


async def _fail(failure: BaseException, method: str, context: Context) -> None:
    """End the call with the status that stands for `failure`; return when it is none of ours."""
    if isinstance(failure, NotImplementedError):  # what generated servicers raise
        failure = Unsupported(f"{method} is not served here")
    if isinstance(failure, KvStoreError):
        code, message, trailing = status_of(failure)
        await context.abort(code, message, trailing)
    elif isinstance(failure, Exception) and not isinstance(failure, grpc.aio.AbortError):
        # Task boundary: the server must answer and go on.
        _log.error("unexpected failure in %s", method, exc_info=failure)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")
