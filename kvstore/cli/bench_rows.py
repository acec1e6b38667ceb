"""Rows of benchmarks (DESIGN §8): interleaved pairs, medians, and what is printed of them."""

import json
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import click
from rich.console import Console
from rich.table import Table

Work = Callable[[], Awaitable[object]]
"""One run of what is measured. A float that it returns is its time in seconds, as measured by
itself (another program's start does not count); else the clock here tells."""


@dataclass(slots=True)
class Bench:
    """One run of one benchmark command: which cases, how many pairs, and where rows go."""

    name: str
    pattern: str = "*"
    pairs: int = 9
    quick: bool = False
    as_json: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)

    def wants(self, *cases: str) -> bool:
        """Say whether any of these cases was asked for."""
        return any(fnmatchcase(case, self.pattern) for case in cases)

    async def against(
        self,
        case: str,
        ours: Work,
        limit: Work,
        *,
        limit_name: str,
        amount: float = 0.0,
        unit: str = "us",
        repeat: int = 1,
        peer: Work | None = None,
        peer_name: str | None = None,
    ) -> None:
        """Measure `ours` beside `limit` and a peer, in turns; `amount` over seconds is the value.

        Without an amount the value is microseconds per run. Ratios are above 1 where ours is
        faster: medians over the turns.
        """
        if not self.wants(case):
            return
        works = [ours, limit, *([peer] if peer is not None else [])]
        for work in works:
            await _timed(work, repeat)
        turns = [[await _timed(work, repeat) for work in works] for _ in range(self.pairs)]
        values = [_value(statistics.median(times), amount) for times in zip(*turns, strict=True)]
        ratios = [
            statistics.median(times[at] / times[0] for times in turns) for at in range(len(works))
        ]
        self.row(
            case, values[0], unit, limit=values[1], limit_name=limit_name, ratio=ratios[1],
            peer=values[2] if peer is not None else None, peer_name=peer_name,
            ratio_to_peer=ratios[2] if peer is not None else None,
        )  # fmt: skip

    def row(
        self,
        case: str,
        value: float,
        unit: str,
        *,
        limit: float | None = None,
        limit_name: str | None = None,
        ratio: float | None = None,
        runs: int | None = None,
        peer: float | None = None,
        peer_name: str | None = None,
        ratio_to_peer: float | None = None,
    ) -> None:
        """Print one result, or keep it for the table."""
        fields: dict[str, Any] = {
            "bench": self.name,
            "case": case,
            "value": _rounded(value),
            "unit": unit,
            "limit": None if limit is None else _rounded(limit),
            "limit_name": limit_name,
            "ratio_to_limit": None if ratio is None else round(ratio, 3),
            "peer": None if peer is None else _rounded(peer),
            "peer_name": peer_name if peer is not None else None,
            "ratio_to_peer": None if ratio_to_peer is None else round(ratio_to_peer, 3),
            "runs": self.pairs if runs is None else runs,
        }
        self.rows.append(fields)
        if self.as_json:
            click.echo(json.dumps(fields))
        else:
            click.echo(f"  {case}", err=True)

    def finish(self) -> None:
        """Print the table for people."""
        if self.as_json:
            return
        table = Table(box=None, header_style="dim", pad_edge=False)
        with_peer = any(row["peer"] is not None for row in self.rows)
        heads = ["case", "value", "limit", "of the limit", "the limit is"]
        for head in [*heads, *(["peer", "of the peer", "the peer is"] if with_peer else [])]:
            words = head in ("case", "the limit is", "the peer is")
            table.add_column(head, justify="left" if words else "right")
        for row in self.rows:
            cells = [row["case"], f"{row['value']:g} {row['unit']}", *_compared(row, "limit")]
            table.add_row(*cells, *(_compared(row, "peer") if with_peer else []))
        Console().print(table)


async def _timed(work: Work, repeat: int) -> float:
    """Return seconds per run of `work`."""
    own_s = 0.0
    started = time.perf_counter()
    for _ in range(repeat):
        result = await work()
        own_s += result if isinstance(result, float) else 0.0
    return (own_s or time.perf_counter() - started) / repeat


def _value(seconds: float, amount: float) -> float:
    return amount / seconds if amount else seconds * 1e6


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _compared(row: dict[str, Any], what: str) -> list[str]:
    """Return the cells about a limit or a peer; empty ones where there is none."""
    if row[what] is None:
        return ["", "", ""]
    ratio = f"{row[f'ratio_to_{what}']:.2f}"
    return [f"{row[what]:g} {row['unit']}", ratio, row[f"{what}_name"] or ""]
