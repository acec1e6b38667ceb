"""Draws hit rate against capacity: HTML with an inline SVG, or PNG through matplotlib.

The HTML loads nothing from anywhere: it can be mailed and opened without a network.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from kvstore.core.errors import BadInput, Unsupported

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS: Final = (
    "#1b6ca8", "#c8553d", "#3c8d4f", "#8452a1", "#b58900", "#2aa198", "#d33682", "#586e75",
)  # fmt: skip
_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 150, 36, 44


class Point(NamedTuple):
    """A share of the trace's unique blocks and the token hit rate there, both 0 to 1."""

    fraction: float
    token_hit: float


@dataclass(frozen=True, slots=True)
class Curve:
    """One policy on one trace, points in order of capacity."""

    trace: str
    policy: str
    points: Sequence[Point]


def check_plot(path: Path) -> None:
    """Raise before a long replay what `write_plot` would raise after it.

    `BadInput` for a name that ends neither in .html nor .png, `Unsupported` where PNG lacks
    matplotlib.
    """
    if path.suffix not in (".html", ".png"):
        raise BadInput(f"--plot {path} ends neither in .html nor in .png")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"--plot {path}: no such directory")
    if path.suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError as error:
            raise Unsupported(
                f"--plot {path} needs matplotlib: pip install kvstore-llm[plot], or take .html"
            ) from error


def write_plot(path: Path, curves: Sequence[Curve]) -> None:
    """Draw one chart per trace into `path`; capacities on a logarithmic axis."""
    check_plot(path)
    assert curves, "nothing to draw"
    if path.suffix == ".png":
        _write_png(path, curves)
        return
    charts = "\n".join(_svg(trace, _of(curves, trace)) for trace in _traces(curves))
    path.write_text(
        "<!doctype html>\n<html lang='en'><meta charset='utf-8'>"
        "<title>Hit rate against capacity</title>\n<style>body{font:14px sans-serif;margin:24px}"
        "svg{display:block;margin-bottom:24px}</style>\n"
        f"<h1>Hit rate against capacity</h1>\n{charts}\n</html>\n",
        encoding="utf-8",
    )


def _traces(curves: Sequence[Curve]) -> list[str]:
    return list(dict.fromkeys(curve.trace for curve in curves))


def _of(curves: Sequence[Curve], trace: str) -> list[Curve]:
    return [curve for curve in curves if curve.trace == trace]


def _svg(trace: str, curves: Sequence[Curve]) -> str:
    """Return one chart: axes, a line and a legend entry per policy."""
    logs = [math.log10(point.fraction) for curve in curves for point in curve.points]
    low, high = min(logs), max(logs)
    top = max(0.01, *(point.token_hit for curve in curves for point in curve.points))
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(point: Point) -> tuple[float, float]:
        share = (math.log10(point.fraction) - low) / (high - low) if high > low else 0.5
        return _LEFT + share * wide, _TOP + (1 - point.token_hit / top) * tall

    parts = [
        f"<svg width='{_WIDTH}' height='{_HEIGHT}' role='img' aria-label='{escape(trace, True)}'>",
        f"<text x='{_LEFT}' y='20' font-weight='bold'>{escape(trace)}</text>",
    ]
    for step in range(5):
        value = top * step / 4
        y = _TOP + (1 - step / 4) * tall
        parts.append(f"<line x1='{_LEFT}' x2='{_LEFT + wide}' y1='{y:.1f}' y2='{y:.1f}' "
                     f"stroke='#ddd'/><text x='{_LEFT - 6}' y='{y + 4:.1f}' font-size='11' "
                     f"text-anchor='end'>{value * 100:.1f} %</text>")  # fmt: skip
    for fraction in sorted({point.fraction for curve in curves for point in curve.points}):
        x, _ = at(Point(fraction, 0.0))
        parts.append(f"<text x='{x:.1f}' y='{_TOP + tall + 18}' font-size='11' "
                     f"text-anchor='middle'>{fraction * 100:g} %</text>")  # fmt: skip
    parts.append(f"<text x='{_LEFT + wide / 2}' y='{_HEIGHT - 6}' font-size='11' "
                 "text-anchor='middle'>capacity, share of unique blocks</text>")  # fmt: skip
    for number, curve in enumerate(curves):
        parts += _line(number, curve, [at(point) for point in curve.points])
    return "\n".join([*parts, "</svg>"])


def _line(number: int, curve: Curve, places: Sequence[tuple[float, float]]) -> list[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    dash = " stroke-dasharray='5 3'" if curve.policy == "opt" else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [
        f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'{dash}/>",
        f"<text x='{_WIDTH - _RIGHT + 24}' y='{_TOP + 14 + 18 * number}' fill='{colour}'>"
        f"{escape(curve.policy)}</text>",
    ]
    parts += [
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'><title>{escape(curve.policy)} "
        f"at {point.fraction * 100:g} %: {point.token_hit * 100:.2f} %</title></circle>"
        for (x, y), point in zip(places, curve.points, strict=True)
    ]
    return parts


def _write_png(path: Path, curves: Sequence[Curve]) -> None:
    from matplotlib.figure import Figure

    traces = _traces(curves)
    figure = Figure(figsize=(8, 4.5 * len(traces)), layout="constrained")
    for number, trace in enumerate(traces, 1):
        axes: Axes = figure.add_subplot(len(traces), 1, number)
        for curve in _of(curves, trace):
            axes.plot(
                [point.fraction * 100 for point in curve.points],
                [point.token_hit * 100 for point in curve.points],
                marker="o",
                linestyle="--" if curve.policy == "opt" else "-",
                label=curve.policy,
            )
        axes.set_xscale("log")
        axes.set(title=trace, xlabel="capacity, % of unique blocks", ylabel="token hit rate, %")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.savefig(path, format="png")
