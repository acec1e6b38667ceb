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
    ) -> None:
        """Measure `ours` beside `limit`, in turns. `amount` per run over seconds is the value.

        Without an amount the value is microseconds per run.
        """
        if not self.wants(case):
            return
        await _timed(ours, repeat)
        await _timed(limit, repeat)
        times = [
            (await _timed(ours, repeat), await _timed(limit, repeat)) for _ in range(self.pairs)
        ]
        self.row(
            case,
            _value(statistics.median(mine for mine, _ in times), amount),
            unit,
            limit=_value(statistics.median(other for _, other in times), amount),
            limit_name=limit_name,
            ratio=statistics.median(other / mine for mine, other in times),
        )

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
            "peer": None,
            "peer_name": None,
            "ratio_to_peer": None,
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
        for head in ("case", "value", "limit", "of the limit", "the limit is"):
            table.add_column(head, justify="left" if head in ("case", "the limit is") else "right")
        for row in self.rows:
            limit = row["limit"]
            table.add_row(
                row["case"],
                f"{row['value']:g} {row['unit']}",
                "" if limit is None else f"{limit:g} {row['unit']}",
                "" if limit is None else f"{row['ratio_to_limit']:.2f}",
                row["limit_name"] or "",
            )
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
