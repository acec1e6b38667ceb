"""The seam between publishers of block events and the view.

One `EventSource` follows one publisher (a node or a worker) by some means: `Watch` over gRPC,
a Redis stream, vLLM's ZMQ stream. It yields what `kvstore.directory.view` applies; it never
decides what an event means.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

from kvstore.directory.events import Event


class EventSource(Protocol):
    """Follows one publisher for ever.

    `events` yields, in order: `Began`, snapshot `Changed`s without numbers, `Ended`, numbered
    `Changed`s, `Marked`s and `Loaded`s; after a lost connection it starts again with `Began`. It
    yields `Lost` at once when the publisher is known to be gone, and never raises for a fault of
    the publisher or the network. Closing the generator (`aclose`) ends the subscription.
    """

    publisher: str

    def events(self) -> AsyncGenerator[Event, None]: ...
