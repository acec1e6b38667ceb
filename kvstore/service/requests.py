"""Fields of requests, checked: what handlers share before they ask the store."""

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import grpc.aio

from kvstore.core.errors import BadInput, TooLarge
from kvstore.core.limits import MAX_DEADLINE_MS, MAX_NAMES_PER_CALL, NAME_BYTES
from kvstore.rpc.v1 import cache_pb2

if TYPE_CHECKING:  # generic in the type stubs only
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext


def now_ms() -> float:
    """Return the node's monotonic clock."""
    return time.monotonic() * 1_000


def patience_s(context: Context, deadline_ms: int) -> float:
    """Return how long a call may look at blocks first; its answer has to get back in time too."""
    left = context.time_remaining()
    patience_s = deadline_ms / 1_000
    return patience_s if left is None else min(patience_s, left / 2)


def peer_host(context: Context) -> str:
    """Return the address that a caller comes from; loopback for a Unix socket's."""
    kind, _, address = context.peer().partition(":")
    if kind not in ("ipv4", "ipv6"):
        return "127.0.0.1"
    return unquote(address).rpartition(":")[0].strip("[]")


def deadline(deadline_ms: int) -> int:
    """Return a deadline that may be asked for; `BadInput` for a longer one."""
    if deadline_ms > MAX_DEADLINE_MS:
        raise BadInput(f"deadline_ms {deadline_ms}; {MAX_DEADLINE_MS} allowed")
    return deadline_ms


def refs(refs: cache_pb2.SlotRefs, what: str) -> list[tuple[int, int]]:
    """Return (slot, generation) pairs; raises `BadInput` or `TooLarge` naming the list."""
    if len(refs.slots) != len(refs.generations):
        raise BadInput(
            f"{what} has {len(refs.slots)} slots and {len(refs.generations)} generations"
        )
    if len(refs.slots) > MAX_NAMES_PER_CALL:
        raise TooLarge(f"{what} has {len(refs.slots)} slots; {MAX_NAMES_PER_CALL} allowed")
    # Sliced: iterating over a message's list costs twice as much.
    return list(zip(refs.slots[:], refs.generations[:], strict=True))


def split(packed: bytes) -> list[bytes]:
    """Return packed names one by one."""
    return [packed[at : at + NAME_BYTES] for at in range(0, len(packed), NAME_BYTES)]
