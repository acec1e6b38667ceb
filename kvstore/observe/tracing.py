"""Traces of single requests across processes: spans where they are turned on, nothing elsewhere.

A span's place in its trace travels as W3C's `traceparent`: in HTTP headers, in gRPC metadata, and
inside a process in plain fields, because one request lives in many tasks. Nothing here imports
OpenTelemetry; `kvstore.observe.otel` does, once an address to export to was given.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Final, Self

from kvstore.core.errors import BadInput

HEADER: Final = "traceparent"
_HEADER_CHARACTERS: Final = 55
"""`00-` 32 hex digits `-` 16 hex digits `-` 2 hex digits."""

Value = str | int | float | bool

CURRENT: ContextVar[str] = ContextVar("kvstore_traceparent", default="")
"""What calls to other processes carry on; empty: none is traced."""


class Span:
    """One piece of work. This one is not recorded: it only hands on what it was given."""

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent
        """To be sent with calls that belong to this work."""

    def set(self, **values: Value) -> None:
        """Note facts about the work."""

    def end(self, error: str = "") -> None:
        """End the work now; `error` names what went wrong. Ending twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Closing a generator is how a caller leaves, and no fault of the work.
        failed = kind is not None and not issubclass(kind, GeneratorExit)
        self.end(kind.__name__ if failed and kind is not None else "")


class Tracing:
    """Begins spans. This one records nothing."""

    @property
    def on(self) -> bool:
        """Say whether spans are recorded."""
        return False

    def begin(self, name: str, parent: str = "", *, age_s: float = 0.0, **values: Value) -> Span:
        """Begin a span under `parent` (a traceparent; empty: a new trace), `age_s` seconds ago."""
        return Span(parent)

    def close(self) -> None:
        """Send what is not sent yet, waiting a few seconds at most."""


OFF: Final = Tracing()


def start_tracing(address: str, *, service: str, name: str) -> Tracing:
    """Return the tracing that exports to a collector at `address` over OTLP/HTTP; empty: none.

    Raises `BadInput` for what is no http address, and where the `otel` extra is not installed.
    """
    if not address:
        return OFF
    if not address.startswith(("http://", "https://")):
        raise BadInput(f"--trace {address!r} is not http://HOST:PORT of an OTLP collector")
    try:
        from kvstore.observe.otel import OtelTracing

        return OtelTracing.exporting(address, service=service, name=name)
    except ModuleNotFoundError as error:
        raise BadInput(f"--trace needs the extra `otel` ({error.name} is not installed)") from error


def checked(traceparent: str | bytes | None) -> str:
    """Return a traceparent that came from outside, or nothing where it is not well formed."""
    text = traceparent.decode("latin-1") if isinstance(traceparent, bytes) else traceparent or ""
    parts = text.split("-")
    well = len(text) == _HEADER_CHARACTERS and list(map(len, parts)) == [2, 32, 16, 2]
    digits = frozenset("0123456789abcdef")
    return text if well and all(digits.issuperset(part) for part in parts) else ""


def from_metadata(metadata: Mapping[str, str | bytes]) -> str:
    """Return the traceparent that a call came with, or nothing."""
    return checked(metadata.get(HEADER))


def to_metadata(traceparent: str) -> tuple[tuple[str, str], ...]:
    """Return what a call carries to hand on its place in the trace."""
    return ((HEADER, traceparent),) if traceparent else ()


@contextmanager
def under(traceparent: str) -> Iterator[None]:
    """Let calls of this task, while the block lasts, belong to a span."""
    token = CURRENT.set(traceparent)
    try:
        yield
    finally:
        CURRENT.reset(token)
