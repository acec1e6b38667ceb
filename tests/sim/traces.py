"""Traces for tests: committed samples, and small ones made here."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvstore.directory.policy import BlockKey
from kvstore.simulate.trace import Trace, TraceRequest

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = REPOSITORY / "tests" / "data" / "traces"
SHARED = REPOSITORY.parent / "shared" / "traces"
"""Full traces, where a checkout has them beside it."""


def sample(name: str) -> Path:
    return SAMPLES / f"{name}.jsonl.gz"


def shared(name: str) -> Path | None:
    """Return the full trace, or None where there is none."""
    for folder in (SHARED, SHARED.parents[2] / "shared" / "traces"):
        for path in (folder / f"{name}.jsonl.gz", folder / f"{name}.first_half.jsonl.gz"):
            if path.is_file():
                return path
    return None


def trace_of(
    prompts: Iterable[Sequence[int]], *, block_tokens: int = 16, name: str = "made"
) -> Trace:
    """Return a trace of one request a second; each prompt is a list of full blocks."""
    return Trace(
        name,
        block_tokens,
        [
            TraceRequest(1_000.0 * at, block_tokens * len(p), 1, [BlockKey(n) for n in p])
            for at, p in enumerate(prompts)
        ],
    )


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
