"""What ranks say to each other, as frames: facts in JSON, arrays as bytes behind them. Pure.

    rank n ─ hello ▶  ◀ orders ─ loaded ▶  ◀ go ─ ready ▶                            once
    rank 0 ─ step, copy ▶ stepped ◀  ─ map ▶ reached ◀        ─ move ▶ moved ◀       any number
    rank 0 ─ end ▶                   failed ◀

A frame on the socket: u32 bytes of the head, u32 bytes of the arrays, head, arrays.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.core.errors import BadInput
from kvworkers.models.step import StepInputs

LENGTHS: Final = struct.Struct("<II")
MAX_HEAD_BYTES: Final = 64 << 10
MAX_ARRAY_BYTES: Final = 64 << 20
"""A step of 8k tokens over sixteen tables of 1M tokens is 4 MiB."""

_STEP_ARRAYS: Final = (
    "tokens", "positions", "slots", "block_tables", "context_lengths", "query_starts",
    "sample_rows",
)  # fmt: skip
_TYPES: Final = ("int32", "int64")


class Kind(StrEnum):
    """What a frame is for."""

    HELLO = "hello"
    ORDERS = "orders"
    LOADED = "loaded"
    GO = "go"
    READY = "ready"
    STEP = "step"
    COPY = "copy"
    """Pages into others, between two steps; answered as a step is."""
    STEPPED = "stepped"
    MAP = "map"
    """Comes with the descriptor of an arena."""
    REACHED = "reached"
    MOVE = "move"
    MOVED = "moved"
    FAILED = "failed"
    END = "end"


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One message; `facts` are numbers and texts, `arrays` whole numbers of 32 or 64 bits."""

    kind: Kind
    facts: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def number(self, name: str) -> int:
        """Return a fact that has to be a whole number; `BadInput` otherwise."""
        value = self.facts.get(name)
        if type(value) is not int:
            raise BadInput(f"{self.kind} without a number {name!r}")
        return value


def pack(frame: Frame) -> bytes:
    """Return a frame as it goes over a socket. Raises `BadInput` for one that is too long."""
    arrays = {name: np.ascontiguousarray(array) for name, array in frame.arrays.items()}
    head = json.dumps(
        {
            "kind": frame.kind.value,
            "facts": dict(frame.facts),
            "arrays": [[name, str(a.dtype), list(a.shape)] for name, a in arrays.items()],
        },
        separators=(",", ":"),
    ).encode()
    body = b"".join(array.tobytes() for array in arrays.values())
    check_lengths(len(head), len(body))
    return LENGTHS.pack(len(head), len(body)) + head + body


def check_lengths(head_bytes: int, array_bytes: int) -> None:
    """Raise `BadInput` for what no frame may have."""
    if not (0 < head_bytes <= MAX_HEAD_BYTES and 0 <= array_bytes <= MAX_ARRAY_BYTES):
        raise BadInput(f"a frame of {head_bytes} and {array_bytes} bytes between ranks")


def unpack(head: bytes, body: bytes) -> Frame:
    """Return the frame of these bytes; `BadInput` for anything that `pack` does not make."""
    try:
        said = json.loads(head)
        kind, facts, listed = Kind(said["kind"]), said["facts"], said["arrays"]
        arrays: dict[str, NDArray[Any]] = {}
        at = 0
        for name, dtype, shape in listed:
            if dtype not in _TYPES or any(type(n) is not int or n < 0 for n in shape):
                raise BadInput(f"{kind}: array {name!r} of {dtype!r} {shape}")
            count = int(np.prod(shape, dtype=np.int64))
            array = np.frombuffer(body, dtype, count, at).reshape(shape)
            arrays[str(name)] = array.copy()  # The next frame may come into the same memory.
            at += array.nbytes
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"not a frame between ranks: {error}") from error
    if not isinstance(facts, dict) or at != len(body):
        raise BadInput(f"{kind}: {len(body)} bytes of arrays, {at} described")
    return Frame(kind, facts, arrays)


def step_frame(number: int, step: StepInputs) -> Frame:
    """Return a step that lies on the host; of carried tokens only that there are some.

    Raises `BadInput` for one that is too long for a frame.
    """
    arrays = {name: getattr(step, name).numpy() for name in _STEP_ARRAYS}
    check_lengths(1, sum(array.nbytes for array in arrays.values()))
    return Frame(Kind.STEP, {"number": number, "carried": step.carried is not None}, arrays)


def step_of(frame: Frame) -> StepInputs:
    """Return the step of a frame, with any tokens where they are carried."""
    missing = [name for name in _STEP_ARRAYS if name not in frame.arrays]
    if missing:
        raise BadInput(f"a step without {', '.join(missing)}")
    tensors: dict[str, Any] = {n: torch.from_numpy(frame.arrays[n]) for n in _STEP_ARRAYS}
    return StepInputs(**tensors)


def copy_frame(number: int, copies: Sequence[tuple[int, int]]) -> Frame:
    """Return the order to copy pages, each into the one beside it."""
    pairs = np.array(copies, dtype=np.int64)
    return Frame(Kind.COPY, {"number": number}, {"sources": pairs[:, 0], "targets": pairs[:, 1]})


def copies_of(frame: Frame) -> list[tuple[int, int]]:
    """Return the pages to copy, and into which."""
    sources, targets = frame.arrays["sources"].tolist(), frame.arrays["targets"].tolist()
    return list(zip(sources, targets, strict=True))


def move_frame(
    job: int, *, store: bool, alone: bool, raw: bool, offsets: Sequence[int], pages: Sequence[int]
) -> Frame:
    """Return the order to copy each rank's part of blocks at `offsets` from or into `pages`."""
    arrays = {
        "offsets": np.array(offsets, dtype=np.int64),
        "pages": np.array(pages, dtype=np.int64),
    }
    return Frame(Kind.MOVE, {"job": job, "store": store, "alone": alone, "raw": raw}, arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a rank is to be: the same for all but for its number, which it knows."""

    model: str
    ranks: int
    device: str
    threads: int | None
    fidelity: str
    pool_bytes: int | None
    step_tokens: int
    max_running: int
    rendezvous: str
    """A file through which the ranks' process group finds together."""
    deadline_ms: int

    def frame(self) -> Frame:
        """Return the orders as they are sent."""
        return Frame(Kind.ORDERS, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def of(cls, frame: Frame) -> "Orders":
        """Read what `frame` made; `BadInput` for anything else."""
        try:
            return cls(**frame.facts)
        except TypeError as error:
            raise BadInput(f"orders of a rank: {error}") from error
