"""The table that `kvstore plan` prints for people."""

from collections.abc import Sequence
from typing import Final

from kvstore.cli.planning import Plan, Question
from kvstore.cli.tier_plan import TierPlan, TraceAnswer
from kvstore.core.model_shape import LayerGroup, LayerKind, ModelShape

_DAY_S: Final = 86_400


def render(question: Question, plans: Sequence[Plan]) -> str:
    """Return the whole report; `plans` answer one question at several context lengths."""
    first = plans[0]
    parts = [_head(question, first), _sizes(plans)]
    parts += [_tiers(plan) for plan in plans]
    if any(plan.money_month for plan in plans):
        parts.append(_money(plans))
    return "\n\n".join(parts)


def render_trace(found: TraceAnswer) -> str:
    """Return what one trace needs, a line for each target."""
    trace = found.trace
    title = (
        f"{trace.name}: {len(trace.requests):,} requests, {trace.input_tokens:,} prompt tokens, "
        f"{binary(found.unique_bytes)} of KV\n"
        f"what holds all of it hits {found.ceiling:.1%}; HBM has {binary(found.hbm_bytes)}"
    )
    costs = list(dict.fromkeys(name for plan in found.plans for name in plan.money_month))
    head = ["target", "hits", "DRAM", "NVMe", "from HBM", "from DRAM", "from NVMe", "saves"]
    head += [f"{name} a month" for name in costs]
    rows = [
        [
            f"{plan.target:.1%}", f"{plan.hit_rate:.1%}",
            *(binary(size) if size else "–" for size in (plan.dram_bytes, plan.nvme_bytes)),
            *(f"{plan.hit[tier]:.1%}" for tier in ("hbm", "dram", "nvme")),
            f"{plan.saved_s / plan.compute_s:.1%} of prefill",
            *(f"{plan.money_month[name]:,.2f}" if name in plan.money_month else "–"
              for name in costs),
        ]
        if plan.reached
        else [f"{plan.target:.1%}", "never", *["–"] * (len(head) - 2)]
        for plan in found.plans
    ]  # fmt: skip
    parts = [title, _table(head, rows), *_reasons(found.plans)]
    return "\n".join(parts)


def _reasons(plans: Sequence[TierPlan]) -> list[str]:
    """Say why a target is never reached: the trace repeats no more, or a tier is too slow."""
    missed = next((plan for plan in plans if not plan.reached), None)
    if missed is None:
        return []
    slow = f"; another {missed.declined:.1%} would be slower to load than to compute"
    return [
        f"never: no tiers hit more than {missed.hit_rate:.1%} of this trace"
        f"{slow if missed.declined >= 0.0005 else ''}"
    ]


def _head(question: Question, first: Plan) -> str:
    model = question.model
    kinds = " + ".join(_kind(group) for group in model.groups)
    crossover = first.crossover_tokens
    lines = [
        f"{model.name}: {model.layers} layers ({kinds}), "
        f"{_sharing(model)}{model.parameters / 1e9:.2f} B weights",
        f"KV ({first.fidelity})   {first.bytes_per_token:,.0f} B a token"
        + (
            f", {first.bytes_per_token_beyond_window:,.0f} B beyond the window"
            if first.bytes_per_token_beyond_window != first.bytes_per_token
            else ""
        ),
        f"weights      {binary(first.weights_bytes)} on {first.gpus} x {first.gpu}; "
        f"{binary(first.kv_bytes_per_gpu)} left for KV on each",
        f"crossover    KV weighs as much as the weights at {crossover:,} tokens in flight"
        if crossover is not None
        else "crossover    KV does not grow with length beyond its windows",
    ]
    return "\n".join(lines)


def _kind(group: LayerGroup) -> str:
    """Name a group with what its size depends on."""
    if group.kind is LayerKind.SLIDING:
        return f"{group.layers} sliding over {group.window_tokens:,} tokens"
    if group.kind is LayerKind.LATENT:
        return f"{group.layers} latent of {group.latent_values} values a token"
    return f"{group.layers} {group.kind}"


def _sharing(model: ModelShape) -> str:
    if model.grouping == 1:
        return ""
    return f"{model.grouping:g} query heads per KV head, "


def _sizes(plans: Sequence[Plan]) -> str:
    rows = [
        [
            f"{plan.context_tokens:,}",
            binary(plan.bytes_per_request),
            f"{plan.users:,}",
            binary(plan.bytes_total),
            f"{plan.max_batch:,}",
            f"{plan.max_context_tokens:,}",
            "–" if plan.gpus_for_users is None else f"{plan.gpus_for_users:,}",
        ]
        for plan in plans
    ]
    head = ["context", "KV a request", "users", "KV of all", "batch", "longest for all", "GPUs"]
    return _table(head, rows)


def _tiers(plan: Plan) -> str:
    rows = [
        [
            tier.tier,
            f"{tier.gb_per_s:,.1f} GB/s",
            period(tier.load_s),
            f"{tier.sooner:,.1f}x",
            f"> {plan.context_tokens:,}"
            if tier.wins_from_tokens is None
            else f"{tier.wins_from_tokens:,}",
            "–" if tier.worth_holding_s is None else period(tier.worth_holding_s),
        ]
        for tier in plan.tiers
    ]
    head = ["tier", "read at", "load", "sooner", "wins from tokens", "worth holding"]
    title = f"{plan.context_tokens:,} tokens: {period(plan.recompute_s)} to compute"
    return f"{title}\n{_table(head, rows)}"


def _money(plans: Sequence[Plan]) -> str:
    names = list(dict.fromkeys(name for plan in plans for name in plan.money_month))
    rows = [
        [
            f"{plan.context_tokens:,}",
            *(f"{plan.money_month[n]:,.2f}" if n in plan.money_month else "–" for n in names),
        ]
        for plan in plans
    ]
    return _table(["a month", *(name.replace("_", " ") for name in names)], rows)


def period(value: float) -> str:
    """Return a time in seconds as people say it."""
    if value < 1:
        return f"{value * 1e3:,.1f} ms"
    if value < 120:
        return f"{value:,.1f} s"
    if value < 2 * 3600:
        return f"{value / 60:,.0f} min"
    return f"{value / 3600:,.0f} h" if value < 2 * _DAY_S else f"{value / _DAY_S:,.0f} d"


def binary(size: int) -> str:
    """Return bytes in binary units with two decimals: quarters of a GiB are usual here."""
    for unit, scale in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 1024:,.1f} KiB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return right-aligned columns under a rule."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
             for row in (head, *rows)]  # fmt: skip
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])
