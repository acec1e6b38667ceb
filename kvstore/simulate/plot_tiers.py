"""Draws hits by tier as stacked bars, one per policy: HTML with an inline SVG, or PNG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.simulate.plot import check_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS: Final = ("#1b6ca8", "#3c8d4f", "#b58900", "#8452a1", "#c8553d", "#586e75")
_LEFT, _WIDE, _TOP, _ROW = 80, 480, 56, 26


@dataclass(frozen=True, slots=True)
class Bar:
    """One policy on one trace: the share of prompt tokens from each tier, nearest tier first."""

    trace: str
    policy: str
    hit: Mapping[str, float]


def write_bars(path: Path, bars: Sequence[Bar]) -> None:
    """Draw one chart per trace into `path`; raises as `check_plot` does."""
    check_plot(path)
    assert bars, "nothing to draw"
    if path.suffix == ".png":
        _write_png(path, bars)
        return
    charts = "\n".join(_svg(trace, mine) for trace, mine in _by_trace(bars).items())
    path.write_text(
        "<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>Hits by tier</title>\n"
        "<style>body{font:14px sans-serif;margin:24px}svg{display:block;margin-bottom:24px}"
        f"</style>\n<h1>Hits by tier, share of prompt tokens</h1>\n{charts}\n</html>\n",
        encoding="utf-8",
    )


def _by_trace(bars: Sequence[Bar]) -> dict[str, list[Bar]]:
    found: dict[str, list[Bar]] = {}
    for bar in bars:
        found.setdefault(bar.trace, []).append(bar)
    return found


def _svg(trace: str, bars: Sequence[Bar]) -> str:
    """Return one chart: a legend of the tiers, and a bar of the full width for 100 %."""
    tall = _TOP + _ROW * len(bars) + 8
    parts = [
        f"<svg width='{_LEFT + _WIDE + 80}' height='{tall}' role='img' "
        f"aria-label='{escape(trace, quote=True)}'>",
        f"<text x='{_LEFT}' y='18' font-weight='bold'>{escape(trace)}</text>",
    ]
    for number, tier in enumerate(bars[0].hit):
        x = _LEFT + 80 * number
        parts.append(f"<rect x='{x}' y='30' width='12' height='12' fill='{_COLOURS[number]}'/>"
                     f"<text x='{x + 16}' y='41' font-size='12'>{escape(tier)}</text>")  # fmt: skip
    for row, bar in enumerate(bars):
        y = _TOP + _ROW * row
        policy = escape(bar.policy)
        parts.append(f"<text x='{_LEFT - 8}' y='{y + 14}' text-anchor='end'>{policy}</text>")
        end = float(_LEFT)
        for number, (tier, share) in enumerate(bar.hit.items()):
            title = f"{policy}, {escape(tier)}: {share * 100:.2f} %"
            parts.append(f"<rect x='{end:.1f}' y='{y}' width='{share * _WIDE:.1f}' height='18' "
                         f"fill='{_COLOURS[number]}'><title>{title}</title></rect>")  # fmt: skip
            end += share * _WIDE
        total = sum(bar.hit.values()) * 100
        parts.append(f"<text x='{end + 6:.1f}' y='{y + 14}' font-size='12'>{total:.1f} %</text>")
    return "\n".join([*parts, "</svg>"])


def _write_png(path: Path, bars: Sequence[Bar]) -> None:
    from matplotlib.figure import Figure

    traces = _by_trace(bars)
    figure = Figure(figsize=(8, 1.5 + 2.5 * len(traces)), layout="constrained")
    for number, (trace, mine) in enumerate(traces.items(), 1):
        axes: Axes = figure.add_subplot(len(traces), 1, number)
        policies = [bar.policy for bar in mine]
        left = [0.0] * len(mine)
        for tier, colour in zip(mine[0].hit, _COLOURS, strict=False):
            shares = [bar.hit[tier] * 100 for bar in mine]
            axes.barh(policies, shares, left=left, color=colour, label=tier)
            left = [done + share for done, share in zip(left, shares, strict=True)]
        axes.invert_yaxis()
        axes.set(title=trace, xlabel="share of prompt tokens, %", xlim=(0, 100))
        axes.legend()
    figure.savefig(path, format="png")
