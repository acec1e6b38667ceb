"""Server interceptors: every handler may raise our errors; callers get their status codes."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc.aio

from kvstore.core.errors import KvStoreError
from kvstore.rpc.errors import status_of

_log = logging.getLogger(__name__)

if TYPE_CHECKING:  # generic in the type stubs only
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Handler = grpc.RpcMethodHandler
    Context = grpc.aio.ServicerContext


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Turns `KvStoreError` into its status; anything else is logged and becomes INTERNAL.

    The caller of an unexpected failure sees no detail of it: messages of foreign exceptions can
    carry other tenants' data.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the handler that `continuation` finds."""
        handler = await continuation(handler_call_details)
        if handler is None or (handler.unary_unary is None and handler.unary_stream is None):
            return handler
        method = str(handler_call_details.method)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _guard_unary(handler.unary_unary, method),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_stream_rpc_method_handler(
            _guard_stream(handler.unary_stream, method),  # type: ignore[arg-type]
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _guard_unary(inner: Callable[..., Any], method: str) -> Callable[..., Any]:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await inner(request, context)
        except KvStoreError as error:
            await _abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception:  # task boundary: the server must answer and go on
            _log.exception("unexpected failure in %s", method)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")

    return guarded


def _guard_stream(inner: Callable[..., Any], method: str) -> Callable[..., Any]:
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for reply in inner(request, context):
                yield reply
        except KvStoreError as error:
            await _abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception:  # task boundary: the server must answer and go on
            _log.exception("unexpected failure in %s", method)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")

    return guarded


async def _abort(context: Context, error: KvStoreError) -> None:
    code, message, trailing = status_of(error)
    await context.abort(code, message, trailing)
