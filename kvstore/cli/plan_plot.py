"""Draws a capacity plan as line charts: HTML with inline SVG that loads nothing, or PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.cli.plan_report import binary, period
from kvstore.cli.planning import MAX_CONTEXT_TOKENS, TIERS, Plan, Question, answer
from kvstore.cli.tier_plan import TraceAnswer
from kvstore.simulate.plot import check_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS: Final = (
    "#1b6ca8", "#c8553d", "#3c8d4f", "#8452a1", "#b58900", "#2aa198", "#d33682", "#586e75",
)  # fmt: skip
_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 190, 40, 48
_FIRST_TOKENS: Final = 1_024
_POINTS: Final = 24
_PERCENT: Final = 100.0


@dataclass(frozen=True, slots=True)
class Line:
    """One curve or, with `level`, a level to compare with; points in order of x, y above 0."""

    name: str
    points: Sequence[tuple[float, float]]
    level: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over a logarithmic x; `log` says whether y is so too."""

    title: str
    x_name: str
    y_name: str
    lines: Sequence[Line]
    log: bool


def charts_of(
    question: Question, plans: Sequence[Plan], answers: Sequence[TraceAnswer]
) -> list[Chart]:
    """Return what there is to draw: memory and time by length, hit rate by size for each trace."""
    charts = []
    if plans:
        longest = max(plan.context_tokens for plan in plans)
        charts += _by_length(question, max(longest, 2 * _FIRST_TOKENS))
    return charts + [_by_size(answer) for answer in answers]


def _by_length(question: Question, longest: int) -> list[Chart]:
    steps = [
        round(_FIRST_TOKENS * (longest / _FIRST_TOKENS) ** (at / (_POINTS - 1)))
        for at in range(_POINTS)
    ]
    plans = [answer(question, min(tokens, MAX_CONTEXT_TOKENS)) for tokens in steps]
    room = plans[0].kv_bytes_per_gpu * plans[0].gpus
    memory = [
        Line(f"KV of {question.users:,} users", [(p.context_tokens, p.bytes_total) for p in plans]),
        Line("weights", [(t, plans[0].weights_bytes) for t in (steps[0], steps[-1])], level=True),
    ]
    if room:
        name = f"room on {plans[0].gpus} x {question.gpu_name}"
        memory.append(Line(name, [(t, room) for t in (steps[0], steps[-1])], level=True))
    time = [Line("compute", [(p.context_tokens, p.recompute_s) for p in plans])]
    time += [
        Line(f"load from {tier}", [(p.context_tokens, p.tiers[at].load_s) for p in plans])
        for at, tier in enumerate(TIERS)
    ]
    name = question.model.name
    return [
        Chart(title=f"{name}: memory for KV", x_name="tokens of each request", y_name="bytes",
              lines=memory, log=True),
        Chart(title=f"{name}: a prefix loaded or computed", x_name="tokens of the prefix",
              y_name="seconds", lines=time, log=True),
    ]  # fmt: skip


def _by_size(answer: TraceAnswer) -> Chart:
    seen = answer.looked_at
    lines = [
        Line("all tiers", [(one.below_bytes, _PERCENT * one.result.token_hit) for one in seen])
    ]
    lines += [
        Line(tier, [(one.below_bytes, _PERCENT * one.result.hit[tier]) for one in seen])
        for tier in ("hbm", "dram", "nvme")
        if any(one.result.hit[tier] for one in seen)
    ]
    ends = (seen[0].below_bytes, seen[-1].below_bytes)
    lines += [
        Line(f"target {plan.target:.1%}", [(x, _PERCENT * plan.target) for x in ends], level=True)
        for plan in answer.plans
    ]
    return Chart(
        title=f"{answer.trace.name}: hit rate by memory below {binary(answer.hbm_bytes)} of HBM",
        x_name="bytes of DRAM and NVMe", y_name="% of prompt tokens", lines=lines, log=False,
    )  # fmt: skip


def write_charts(path: Path, charts: Sequence[Chart]) -> None:
    """Draw into `path`; raises as `check_plot` does."""
    check_plot(path)
    assert charts, "nothing to draw"
    if path.suffix == ".png":
        _write_png(path, charts)
        return
    drawn = "\n".join(_svg(chart) for chart in charts)
    path.write_text(
        "<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>Capacity plan</title>\n"
        "<style>body{font:14px sans-serif;margin:24px}svg{display:block;margin-bottom:24px;"
        f"max-width:100%}}</style>\n<h1>Capacity plan</h1>\n{drawn}\n</html>\n",
        encoding="utf-8",
    )


class _Scale:
    """Where values lie on one axis, and what stands beside it."""

    def __init__(self, values: Sequence[float], *, unit: str, log: bool) -> None:
        assert values and (not log or min(values) > 0)
        self._log = log
        self._unit = unit
        low, high = (min(values), max(values)) if log else (0.0, max(values) * 1.05 or 1.0)
        self._low, self._high = (math.log2(low), math.log2(high)) if log else (low, high)

    def at(self, value: float) -> float:
        """Return where a value lies, 0 to 1."""
        place = math.log2(value) if self._log else value
        return (place - self._low) / (self._high - self._low) if self._high > self._low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Return a handful of round values with their names."""
        if not self._log:
            step = _round_step(self._high / 5)
            values = [step * at for at in range(int(self._high / step) + 1)]
        elif self._unit == "seconds":
            first, last = (round(end * math.log10(2)) for end in (self._low, self._high))
            values = [10.0**power for power in range(first, last + 1)]
        else:
            first, last = math.ceil(self._low), math.floor(self._high)
            values = [2.0**power for power in range(first, last + 1, max(1, (last - first) // 5))]
        return [(value, self._name(value)) for value in values if 0 <= self.at(value) <= 1]

    def _name(self, value: float) -> str:
        if self._unit.startswith("bytes"):
            return binary(int(value)).replace(".00", "")
        if self._unit == "seconds":
            return period(value).replace(".0 ", " ")
        return f"{value:,g}"


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2, 5, 10 … times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * times for times in (1, 2, 5, 10) if power * times >= least * 0.999)


def _svg(chart: Chart) -> str:
    """Return one chart: axes, lines and a legend."""
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    points = [point for line in chart.lines for point in line.points]
    across = _Scale([x for x, _ in points], unit=chart.x_name, log=True)
    up = _Scale([y for _, y in points], unit=chart.y_name, log=chart.log)

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + across.at(x) * wide, _TOP + (1 - up.at(y)) * tall

    title = escape(chart.title, quote=True)
    parts = [
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' role='img' aria-label='{title}'>",
        f"<text x='{_LEFT}' y='16' font-weight='bold'>{title}</text>",
        f"<text x='{_LEFT - 66}' y='{_TOP - 10}' font-size='11'>{escape(chart.y_name)}</text>",
        f"<text x='{_LEFT + wide / 2}' y='{_HEIGHT - 8}' font-size='11' text-anchor='middle'>"
        f"{escape(chart.x_name)}</text>",
    ]
    for value, name in up.ticks():
        y = _TOP + (1 - up.at(value)) * tall
        parts.append(f"<line x1='{_LEFT}' x2='{_LEFT + wide}' y1='{y:.1f}' y2='{y:.1f}' "
                     f"stroke='#ddd'/><text x='{_LEFT - 6}' y='{y + 4:.1f}' font-size='11' "
                     f"text-anchor='end'>{name}</text>")  # fmt: skip
    for value, name in across.ticks():
        x = _LEFT + across.at(value) * wide
        parts.append(f"<text x='{x:.1f}' y='{_TOP + tall + 18}' font-size='11' "
                     f"text-anchor='middle'>{name}</text>")  # fmt: skip
    for number, line in enumerate(chart.lines):
        parts += _drawn(number, line, [place(x, y) for x, y in line.points])
    return "\n".join([*parts, "</svg>"])


def _drawn(number: int, line: Line, places: Sequence[tuple[float, float]]) -> list[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    dash = " stroke-dasharray='5 3'" if line.level else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    x, y = _WIDTH - _RIGHT + 14, _TOP + 8 + 20 * number
    name = escape(line.name)
    return [
        f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'{dash}>"
        f"<title>{name}</title></polyline>",
        f"<line x1='{x}' x2='{x + 22}' y1='{y}' y2='{y}' stroke='{colour}' stroke-width='3'{dash}/>"
        f"<text x='{x + 28}' y='{y + 4}' font-size='12'>{name}</text>",
    ]


def _write_png(path: Path, charts: Sequence[Chart]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5 * len(charts)), layout="constrained")
    for number, chart in enumerate(charts, 1):
        axes: Axes = figure.add_subplot(len(charts), 1, number)
        points = [point for line in chart.lines for point in line.points]
        for at, line in enumerate(chart.lines):
            axes.plot(
                [x for x, _ in line.points],
                [y for _, y in line.points],
                linestyle="--" if line.level else "-",
                color=_COLOURS[at % len(_COLOURS)],
                label=line.name,
            )
        axes.set_xscale("log", base=2)
        if chart.log:
            axes.set_yscale("log")
        for axis, unit, values, log in (
            (axes.xaxis, chart.x_name, [x for x, _ in points], True),
            (axes.yaxis, chart.y_name, [y for _, y in points], chart.log),
        ):
            ticks = _Scale(values, unit=unit, log=log).ticks()
            axis.set_ticks([value for value, _ in ticks], labels=[name for _, name in ticks])
            axis.set_ticks([], minor=True)
        axes.set(title=chart.title, xlabel=chart.x_name, ylabel=chart.y_name)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, format="png")
