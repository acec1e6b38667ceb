"""Readers of traces: our own fields, Mooncake's and Dynamo's JSONL, and recordings of a service.

All are one JSON object a line, plain or gzip. What differs is names:

    field         ours, `kvstore record`   Mooncake            Dynamo
    time          timestamp_ms             timestamp           timestamp or created_time; a later
                                                               turn may have delay (delay_ms) only
    lengths       input_length, output_length                  or input_tokens, output_tokens
    blocks        hash_ids                 hash_ids            hash_ids
    conversation  session, turn            -                   session_id; turns counted here
    kind          type                     -                   -
    first block   first_block              -                   -

A turn that has only a delay arrives that long after the turn before it: the trace does not hold
how long that one was served, so replay is open-loop.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final, cast

from kvstore.core.errors import BadInput
from kvstore.core.limits import MAX_NAMES_PER_CALL
from kvstore.simulate.trace import KeyMaker, Trace, TraceRequest, block_tokens_of

_TIMES: Final = ("timestamp_ms", "timestamp", "created_time")
_DELAYS: Final = ("delay", "delay_ms")
_INPUTS: Final = ("input_length", "input_tokens")
_OUTPUTS: Final = ("output_length", "output_tokens")
_GZIP_MAGIC: Final = b"\x1f\x8b"
MAX_LINE_BYTES: Final = 64 << 20
"""A line of the largest prompt is far below; a file without line ends must not fill memory."""


def read_trace(path: Path, *, block_tokens: int | None = None, limit: int | None = None) -> Trace:
    """Read a whole trace, sorted by time; at most its first `limit` requests.

    Raises `BadInput` naming file and line of what is malformed, and where `block_tokens` is not
    given and does not follow from the requests' lengths.
    """
    requests: list[TraceRequest] = []
    for request in stream_requests(path):
        if limit is not None and len(requests) == limit:
            break
        requests.append(request)
    if not requests:
        raise BadInput(f"{path}: no requests")
    requests.sort(key=lambda request: request.timestamp_ms)
    size = block_tokens or block_tokens_of(requests, str(path))
    for number, request in enumerate(requests, 1):
        if request.input_tokens > size * len(request.blocks):
            raise BadInput(
                f"{path}: request {number} has {request.input_tokens} tokens in "
                f"{len(request.blocks)} blocks of {size}"
            )
    return Trace(trace_name(path), size, requests)


def trace_name(path: Path) -> str:
    """Return the file's name without what says how it is stored."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")


def stream_requests(path: Path) -> Iterator[TraceRequest]:
    """Yield the requests of a file in its order, one line in memory at a time.

    Raises `BadInput` naming file and line.
    """
    reader = _LineReader(path)
    try:
        with _open(path) as file:
            for number, line in enumerate(_lines(file, path), 1):
                if line.strip():
                    yield reader.request(line, number)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"trace {path}: {error}") from error


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        zipped = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    return cast("IO[bytes]", gzip.open(path, "rb")) if zipped else path.open("rb")


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES:
            raise BadInput(f"{path}:{number}: line longer than {MAX_LINE_BYTES} bytes")
        yield line


class _LineReader:
    """Makes requests of lines; remembers keys, and turns of sessions that only have delays."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys = KeyMaker()
        self._last: dict[str, tuple[float, int]] = {}
        """Session of Dynamo's rows → (time, turn) of its latest row."""

    def request(self, line: bytes, number: int) -> TraceRequest:
        where = f"{self._path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadInput(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadInput(f"{where}: {type(row).__name__} instead of an object")
        session, turn, time_ms = self._standing(row, where)
        ids = self._ids(row, where)
        input_tokens = _count(row, _INPUTS, where)
        kind = row.get("type")
        if kind is not None and not isinstance(kind, str):
            raise BadInput(f"{where}: type is not a text")
        if input_tokens and not ids:
            raise BadInput(f"{where}: {input_tokens} tokens and no hash_ids")
        return TraceRequest(
            timestamp_ms=time_ms,
            input_tokens=input_tokens,
            output_tokens=_count(row, _OUTPUTS, where, default=0),
            blocks=self._keys.keys(ids),
            session=session,
            turn=turn,
            kind=kind or "",
            first_block=_count(row, ("first_block",), where, default=0),
        )

    def _standing(self, row: Mapping[str, Any], where: str) -> tuple[str, int, float]:
        """Return (session, turn, time in ms)."""
        given = row.get("session", row.get("session_id"))
        if not isinstance(given, str | int | None):
            raise BadInput(f"{where}: session is neither a text nor a number")
        session = "" if given is None else str(given)
        last_ms, last_turn = self._last.get(session, (0.0, 0)) if session else (0.0, 0)
        time_ms = _number(row, _TIMES, where)
        if time_ms is None:
            delay_ms = _number(row, _DELAYS, where)
            if delay_ms is None or not last_turn:
                raise BadInput(f"{where}: none of {', '.join(_TIMES)}")
            time_ms = last_ms + delay_ms
        turn = row.get("turn")
        if turn is None and "session_id" in row and session:
            turn = last_turn + 1
        if not isinstance(turn, int | None) or (turn is not None and turn < 0):
            raise BadInput(f"{where}: turn {turn!r:.40} is not a count")
        if session and "session_id" in row:
            self._last[session] = (time_ms, turn or last_turn + 1)
        return session, turn or 0, time_ms

    def _ids(self, row: Mapping[str, Any], where: str) -> list[int]:
        ids = row.get("hash_ids")
        if not isinstance(ids, list) or set(map(type, ids)) - {int}:
            raise BadInput(f"{where}: hash_ids is not a list of whole numbers")
        if len(ids) > MAX_NAMES_PER_CALL:
            raise BadInput(f"{where}: {len(ids)} hash_ids, at most {MAX_NAMES_PER_CALL}")
        if len(set(ids)) != len(ids):
            raise BadInput(f"{where}: a block stands twice in one prefix")
        if ids and not 0 <= min(ids) <= max(ids) < 1 << 64:
            raise BadInput(f"{where}: hash_ids must be of 64 bits and not negative")
        return ids


def _number(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> float | None:
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        sound = isinstance(value, int | float) and not isinstance(value, bool)
        if not sound or not math.isfinite(value) or value < 0:
            raise BadInput(f"{where}: {name} {value!r:.40} is not a number of milliseconds")
        return float(value)
    return None


def _count(
    row: Mapping[str, Any], names: tuple[str, ...], where: str, *, default: int | None = None
) -> int:
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise BadInput(f"{where}: {name} {value!r:.40} is not a count")
        return value
    if default is None:
        raise BadInput(f"{where}: none of {', '.join(names)}")
    return default
