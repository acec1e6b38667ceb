"""Spans by OpenTelemetry, sent in the background; imported only where tracing is turned on."""

import time
from typing import TYPE_CHECKING, Final, Self

from kvstore.observe.tracing import HEADER, Span, Tracing, Value

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as RealSpan

_EXPORT_SECONDS: Final = 2
"""One try to send; a collector that is away costs spans, never a request."""
_QUEUED: Final = 2_048
"""Spans that may wait to be sent; more are dropped."""
_EVERY_MS: Final = 1_000


class OtelSpan(Span):
    """A span that is recorded."""

    def __init__(self, span: "RealSpan") -> None:
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
        super().__init__(carrier.get(HEADER, ""))
        self._span = span

    def set(self, **values: Value) -> None:
        """Note facts, under `kvstore.`."""
        for key, value in values.items():
            self._span.set_attribute(f"kvstore.{key}", value)

    def end(self, error: str = "") -> None:
        """End it now."""
        from opentelemetry.trace import Status, StatusCode

        if not self._span.is_recording():
            return
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


class OtelTracing(Tracing):
    """Spans of one process, given to an exporter in batches by a thread of its own."""

    def __init__(self, exporter: "SpanExporter", *, service: str, name: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": service, "service.instance.id": name})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=_QUEUED, schedule_delay_millis=_EVERY_MS)
        )
        self._tracer = self._provider.get_tracer("kvstore")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def exporting(cls, address: str, *, service: str, name: str) -> Self:
        """Return the tracing that sends to a collector's `/v1/traces` over OTLP/HTTP."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        endpoint = f"{address.rstrip('/')}/v1/traces"
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_SECONDS)
        return cls(exporter, service=service, name=name)

    @property
    def on(self) -> bool:
        """Say that spans are recorded."""
        return True

    def begin(self, name: str, parent: str = "", *, age_s: float = 0.0, **values: Value) -> Span:
        """Begin a span; see `Tracing`."""
        context = self._propagator.extract({HEADER: parent}) if parent else None
        began_ns = time.time_ns() - int(age_s * 1e9)
        span = OtelSpan(self._tracer.start_span(name, context=context, start_time=began_ns))
        span.set(**values)
        return span

    def close(self) -> None:
        """Send what is left and end the thread."""
        self._provider.shutdown()
