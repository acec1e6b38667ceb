"""Writes recordings as traces: one JSON object a line, gzip, in files of bounded size and number.

`NAME.jsonl.gz` is being written; when it is full it becomes `NAME.1.jsonl.gz`, the one before it
`NAME.2.jsonl.gz`, and the oldest goes. Each file is a trace that `read_trace` takes by itself; ids
are the same in all of them.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from kvstore.core.errors import BadInput

SUFFIX: Final = ".jsonl.gz"


class TraceWriter:
    """Appends requests to a trace on disk. A context manager: leaving it completes the file."""

    def __init__(self, path: Path, *, file_bytes: int, files: int) -> None:
        """Raises `BadInput` for a name without the suffix, a file that is there, or no directory.

        `file_bytes` bounds the text of one file, before compression; `files` how many are kept.
        """
        assert file_bytes > 0 and files > 0
        if not path.name.endswith(SUFFIX) or path.name == SUFFIX:
            raise BadInput(f"--out {path} does not end in {SUFFIX}")
        self._path = path
        self._file_bytes = file_bytes
        self._files = files
        self._written = 0
        self.requests = 0
        """Requests written, in all files."""
        self._file = self._open()

    def write(
        self, elapsed_ms: int, *, first_block: int, blocks: Sequence[int], block_tokens: int
    ) -> None:
        """Append one request whose blocks are all full."""
        row = {
            "timestamp_ms": elapsed_ms,
            "input_length": len(blocks) * block_tokens,
            "output_length": 0,
            "hash_ids": list(blocks),
            "first_block": first_block,
        }
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        if self._written and self._written + len(line) > self._file_bytes:
            self._rotate()
        self._file.write(line)
        self._written += len(line)
        self.requests += 1

    def flush(self) -> None:
        """Put what was written so far into the file, so that a crash loses the end only."""
        self._file.flush()

    def close(self) -> None:
        """Complete the file; a file without a request is removed."""
        self._file.close()
        if not self._written:
            self._path.unlink()

    def _open(self) -> gzip.GzipFile:
        self._written = 0
        try:
            # "x": a recording never overwrites what is there.
            return gzip.open(self._path, "xb", compresslevel=6)
        except OSError as error:
            raise BadInput(f"--out {self._path}: {error.strerror}") from error

    def _older(self, age: int) -> Path:
        return self._path.with_name(f"{self._path.name.removesuffix(SUFFIX)}.{age}{SUFFIX}")

    def _rotate(self) -> None:
        self._file.close()
        if self._files == 1:
            self._path.unlink()
        else:
            for age in range(self._files - 1, 1, -1):
                if self._older(age - 1).exists():
                    self._older(age - 1).replace(self._older(age))
            self._path.replace(self._older(1))
        self._file = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
