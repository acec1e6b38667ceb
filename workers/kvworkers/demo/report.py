"""What a demonstration prints: rows and a summary, as JSON for programs and tables for people."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kvworkers.demo.check import Verdict
from kvworkers.demo.talk import Exchange, Pair

TIERS = ("hbm", "dram", "nvme", "peer")
_LABELS: Final = {
    "hbm": "HBM (the worker's own pages)",
    "dram": "DRAM (the host's arena)",
    "nvme": "NVMe (the host's disk)",
    "peer": "peers (other hosts)",
}
_ALWAYS: Final = ("hbm", "dram")
"""Tiers that every cluster has; others are shown where something came from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One whole demonstration."""

    exchanges: Sequence[Exchange]
    pairs: Sequence[Pair]
    verdicts: Sequence[Verdict]
    seconds: float

    @property
    def equal(self) -> int:
        """Replies that are the uncached model's own."""
        return sum(verdict.equal for verdict in self.verdicts)

    @property
    def passed(self) -> bool:
        return bool(self.exchanges) and self.equal == len(self.exchanges)

    def hit_rate(self) -> dict[str, float]:
        """Return the share of all prompt tokens that came from each tier."""
        total = sum(e.answer.prompt_tokens for e in self.exchanges) or 1
        return {
            tier: round(sum(e.answer.cached[tier] for e in self.exchanges) / total, 4)
            for tier in TIERS
        }


def row(exchange: Exchange) -> dict[str, Any]:
    """Return one request's line of `--json`."""
    answer = exchange.answer
    return {
        "request": exchange.request,
        "client": exchange.client,
        "turn": exchange.turn,
        "prompt_tokens": answer.prompt_tokens,
        "cached": answer.cached,
        "ttft_ms": round(answer.ttft_ms, 1),
        "tokens": len(answer.tokens),
        "worker": answer.worker,
    }


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return the last line of `--json`."""
    return {
        "summary": {
            "requests": len(outcome.exchanges),
            "equal_to_uncached": outcome.equal,
            "hit_rate": outcome.hit_rate(),
            "ttft_cold_ms": _median([pair.cold_ms for pair in outcome.pairs]),
            "ttft_hit_ms": _median([pair.hit_ms for pair in outcome.pairs]),
            "seconds": round(outcome.seconds, 1),
        }
    }


def _median(values: Sequence[float]) -> float | None:
    return round(median(values), 1) if values else None


def live_line(exchange: Exchange) -> str:
    """Return the line shown when a request ends, in rich's markup."""
    answer = exchange.answer
    share = answer.cached_tokens / answer.prompt_tokens
    colour = "green" if share > 0.5 else "yellow"
    words = " ".join(answer.text.split())
    quote = words if len(words) <= 60 else words[:59] + "…"
    return (
        f"  client {exchange.client} turn {exchange.turn + 1}: "
        f"[{colour}]{answer.cached_tokens:>5}[/] of {answer.prompt_tokens} cached, "
        f"first token in [bold]{answer.ttft_ms:>5.0f} ms[/] at {answer.worker} "
        f"[dim]“{_plain(quote)}”[/]"
    )


def _plain(text: str) -> str:
    """Return `text` so that rich takes no bracket in it for markup."""
    return text.replace("[", "\\[")


def print_tables(console: Console, outcome: Outcome) -> None:
    """Print the account of a whole demonstration."""
    console.print(_requests(outcome))
    console.print(_tiers(outcome))
    if outcome.pairs:
        console.print(_pairs(outcome.pairs))
    _print_verdict(console, outcome)


def _table(title: str) -> Table:
    """Return an empty table of our look: no frame, so that ten columns fit a terminal."""
    return Table(
        title=f"\n[bold not italic]{title}",
        title_justify="left",
        header_style="dim",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _requests(outcome: Outcome) -> Table:
    table = _table("Requests: prompt tokens by where they came from")
    tiers = _shown(outcome)
    heads = [_LABELS[tier].partition(" ")[0] for tier in tiers]
    for name in ("client", "turn", "prompt", *heads, "computed", "TTFT ms", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("worker")
    table.add_column("equal", justify="center")
    verdicts = {verdict.request: verdict for verdict in outcome.verdicts}
    for exchange in outcome.exchanges:
        answer = exchange.answer
        verdict = verdicts.get(exchange.request)
        mark = "?" if verdict is None else "[green]yes" if verdict.equal else "[red]NO"
        table.add_row(
            str(exchange.client),
            str(exchange.turn + 1),
            str(answer.prompt_tokens),
            *(_count(answer.cached[tier]) for tier in tiers),
            str(answer.prompt_tokens - answer.cached_tokens),
            f"{answer.ttft_ms:.0f}",
            f"{answer.tokens_per_second:.1f}",
            answer.worker,
            mark,
        )
    return table


def _count(tokens: int) -> str:
    return f"[green]{tokens}" if tokens else "[dim]–"


def _tiers(outcome: Outcome) -> Table:
    table = _table("Hit rate of all prompt tokens")
    table.add_column("tier")
    table.add_column("tokens", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    prompt = sum(e.answer.prompt_tokens for e in outcome.exchanges)
    cached = 0
    for tier in _shown(outcome):
        tokens = _tokens(outcome, tier)
        cached += tokens
        table.add_row(_LABELS[tier], *_share(tokens, prompt))
    table.add_row("computed", *_share(prompt - cached, prompt))
    return table


def _shown(outcome: Outcome) -> list[str]:
    """Return the tiers worth a column."""
    return [tier for tier in TIERS if tier in _ALWAYS or _tokens(outcome, tier)]


def _tokens(outcome: Outcome, tier: str) -> int:
    return sum(exchange.answer.cached[tier] for exchange in outcome.exchanges)


def _share(tokens: int, total: int) -> tuple[str, str, str]:
    share = tokens / (total or 1)
    return f"{tokens:,}", f"{share:.1%}", "█" * round(share * 30)


def _pairs(pairs: Sequence[Pair]) -> Table:
    table = _table("Time to first token, alone")
    for name in ("prompt", "cached", "with cache", "without", "sooner"):
        table.add_column(name, justify="right")
    for pair in pairs:
        table.add_row(
            str(pair.prompt_tokens),
            str(pair.hit_tokens),
            f"{pair.hit_ms:.0f} ms",
            f"{pair.cold_ms:.0f} ms",
            f"{pair.cold_ms / pair.hit_ms:.1f}x",
        )
    ratio = median(pair.cold_ms / pair.hit_ms for pair in pairs)
    table.add_section()
    table.add_row(
        "median",
        "",
        f"{median(p.hit_ms for p in pairs):.0f} ms",
        f"{median(p.cold_ms for p in pairs):.0f} ms",
        f"[bold green]{ratio:.1f}x",
    )
    return table


def _print_verdict(console: Console, outcome: Outcome) -> None:
    console.print()
    total = len(outcome.exchanges)
    ties = sum(verdict.near_ties for verdict in outcome.verdicts)
    if ties:
        console.print(f"{ties} replies compared up to a near tie (top two logits within 1e-3)")
    for verdict in outcome.verdicts:
        if not verdict.equal:
            console.print(f"[red]request {verdict.request}: {verdict.detail}")
    if outcome.passed:
        console.print(f"[bold green]All {total} replies equal the uncached model's greedy replies.")
    else:
        console.print(f"[bold red]Only {outcome.equal} of {total} replies equal the model's own.")
    console.print(f"[dim]{outcome.seconds:.0f} s in all")
