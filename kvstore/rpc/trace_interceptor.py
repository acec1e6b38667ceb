"""Spans of unary calls, where tracing is on and the caller is traced."""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from kvstore.observe.tracing import Tracing, from_metadata
from kvstore.rpc.interceptors import Context, Handler


class TraceInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Begins a span named after the method under the caller's. Others' calls are left alone."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the handler that `continuation` finds, if it is unary."""
        handler = await continuation(handler_call_details)
        parent = from_metadata(dict(handler_call_details.invocation_metadata or ()))
        inner = getattr(handler, "unary_unary", None)
        if not parent or inner is None:
            return handler
        name = str(handler_call_details.method).rpartition("/")[2]

        async def traced(request: Any, context: Context) -> Any:
            with self._tracing.begin(name, parent):
                answer = inner(request, context)
                return await answer if inspect.isawaitable(answer) else answer

        wrapped: Handler = grpc.unary_unary_rpc_method_handler(
            traced,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return wrapped
