"""What `kvstore top` shows: figures of several processes put together, and drawn. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvstore.cli.scrape import Figures
from kvstore.cli.targets import Target
from kvstore.cli.values import format_bytes

Summary = dict[str, Any]
_BREAKER: Final = ("closed", "half open", "OPEN")
_BAR: Final = 12
_USAGE: Final = "kvstore_domain_tokens_total"


def summarise(
    now: Mapping[Target, Figures], before: Mapping[Target, Figures], seconds: float | None
) -> Summary:
    """Return what `--json` prints.

    Counters are those of the last `seconds`; with None, of the processes' whole lives.
    """
    grown = {
        target: page.since(before[target]) if target in before else page
        for target, page in now.items()
    }
    flow = Figures(sample for page in grown.values() for sample in page.samples())
    level = Figures(sample for page in now.values() for sample in page.samples())
    return {
        "seconds": seconds,
        "requests": _requests(flow, level, seconds),
        "nodes": [_node(t, now[t], grown[t]) for t in now if _has(now[t], "kvstore_node_info")],
        "workers": [
            _worker(t, now[t], grown[t], seconds) for t in now if _has(now[t], "kvstore_worker_kv_")
        ],
        "domains": [
            {
                "domain": domain,
                "prompt_tokens": int(tokens),
                "hit_rate": _share(_domain(flow, domain, "cached"), tokens),
                "output_tokens": int(_domain(flow, domain, "output")),
            }
            for domain, tokens in flow.by("domain", _USAGE, kind="prompt").items()
        ],
    }


def _requests(flow: Figures, level: Figures, seconds: float | None) -> Summary:
    prompt = flow.total("kvstore_prompt_tokens_total")
    tiers = flow.by("tier", "kvstore_cached_tokens_total")
    outcomes = flow.by("outcome", "kvstore_requests_total")
    return {
        "ended": {outcome: int(count) for outcome, count in outcomes.items()},
        "per_s": sum(outcomes.values()) / seconds if seconds else None,
        "running": int(level.total("kvstore_requests_in_flight")),
        "waiting": int(level.total("kvstore_router_waiting")),
        "prompt_tokens": int(prompt),
        "hit_rate": _share(sum(tiers.values()), prompt),
        "hit_rate_by_tier": {tier: _share(n, prompt) for tier, n in tiers.items() if n},
        "false_hit_rate": _share(
            flow.total("kvstore_false_hit_tokens_total"),
            flow.total("kvstore_routed_hit_tokens_total", kind="predicted"),
        ),
        "ttft_s": {
            "cached": _mean(flow, "kvstore_ttft_seconds", cached="yes"),
            "uncached": _mean(flow, "kvstore_ttft_seconds", cached="no"),
            "predicted": _mean(flow, "kvstore_predicted_ttft_seconds"),
            "actual": _mean(flow, "kvstore_actual_ttft_seconds"),
        },
        "tpot_s": _mean(flow, "kvstore_tpot_seconds"),
    }


def _node(target: Target, level: Figures, flow: Figures) -> Summary:
    hits = flow.by("tier", "kvstore_node_hit_blocks_total")
    asked = sum(hits.values()) + flow.total("kvstore_node_missed_blocks_total")
    breakers = {
        tier: max(level.by("operation", "kvstore_tier_breaker", tier=tier).values())
        for tier in level.by("tier", "kvstore_tier_breaker")
    }
    return {
        "name": next(iter(level.by("node", "kvstore_node_info")), target.name),
        "tiers": [
            {
                "tier": tier,
                "used_bytes": int(level.total("kvstore_tier_used_bytes", tier=tier)),
                "capacity_bytes": int(capacity),
                "hit_rate": _share(hits.get(tier, 0.0), asked),
                "evicted_blocks": int(
                    flow.total("kvstore_node_evicted_blocks_total", tier=tier)
                    + flow.total("kvstore_tier_dropped_blocks_total", tier=tier)
                ),
                "breaker": _BREAKER[int(breakers.get(tier, 0))],
            }
            for tier, capacity in level.by("tier", "kvstore_tier_capacity_bytes").items()
        ],
        "sessions": int(level.total("kvstore_node_sessions")),
        "leases": int(level.total("kvstore_node_leases")),
        "pinned_blocks": int(level.total("kvstore_node_pinned_blocks")),
        "fragmentation": level.total("kvstore_node_fragmentation_ratio"),
        "corrupt_blocks": int(flow.total("kvstore_node_corrupt_blocks_total")),
        "misses": {
            reason: int(count)
            for reason, count in flow.by("reason", "kvstore_node_missed_blocks_total").items()
        },
    }


def _worker(target: Target, level: Figures, flow: Figures, seconds: float | None) -> Summary:
    tokens = flow.total("kvstore_worker_output_tokens_total")
    return {
        "name": target.name,
        "running": int(level.total("kvstore_worker_running")),
        "waiting": int(level.total("kvstore_worker_waiting")),
        "kv_used_bytes": int(level.total("kvstore_worker_kv_used_bytes")),
        "kv_capacity_bytes": int(level.total("kvstore_worker_kv_capacity_bytes")),
        "output_tokens": int(tokens),
        "output_tokens_per_s": tokens / seconds if seconds else None,
        "queue_s": _mean(flow, "kvstore_worker_queue_seconds"),
        "tpot_s": _mean(flow, "kvstore_worker_tpot_seconds"),
        "store_failures": int(flow.total("kvstore_worker_store_failures_total")),
    }


def draw(summary: Summary, unreachable: Sequence[str]) -> Group:
    """Return the whole view for a terminal."""
    since = f"last {summary['seconds']:.1f} s" if summary["seconds"] else "since the start"
    parts: list[Any] = [_head(summary["requests"], since), _tiers(summary["nodes"])]
    parts += [_workers(summary["workers"])] if summary["workers"] else []
    parts += [_domains(summary["domains"])] if summary["domains"] else []
    parts += [Text(f"not reached: {line}", style="bold red") for line in unreachable]
    return Group(*parts)


def _head(requests: Summary, since: str) -> Text:
    tiers = ", ".join(f"{t} {_percent(r)}" for t, r in requests["hit_rate_by_tier"].items())
    ttft, pace = requests["ttft_s"], requests["per_s"]
    ended = ", ".join(f"{n} {outcome}" for outcome, n in requests["ended"].items() if n)
    return Text(
        f"{since}: {requests['running']} running, {requests['waiting']} waiting"
        f"{'' if pace is None else f', {pace:.2f} requests/s'}; ended: {ended or 'none'}\n"
        f"hit rate {_percent(requests['hit_rate'])} of {requests['prompt_tokens']} prompt tokens"
        f" ({tiers or 'no hits'}); promised and not found {_percent(requests['false_hit_rate'])}\n"
        f"first token {_ms(ttft['cached'])} cached, {_ms(ttft['uncached'])} not;"
        f" predicted {_ms(ttft['predicted'])}, actual {_ms(ttft['actual'])};"
        f" per output token {_ms(requests['tpot_s'])}"
    )


def _tiers(nodes: Sequence[Summary]) -> Table:
    table = _table("tiers", "node", "tier", "full", "held", "of", "hit rate", "evicted", "breaker")
    for node in nodes:
        for tier in node["tiers"]:
            full = _share(tier["used_bytes"], tier["capacity_bytes"]) or 0.0
            filled = round(full * _BAR)
            table.add_row(
                node["name"], tier["tier"],
                f"{'#' * filled}{'.' * (_BAR - filled)} {_percent(full)}",
                format_bytes(tier["used_bytes"]), format_bytes(tier["capacity_bytes"]),
                _percent(tier["hit_rate"]), str(tier["evicted_blocks"]), tier["breaker"],
            )  # fmt: skip
    return table


def _workers(workers: Sequence[Summary]) -> Table:
    table = _table(
        "workers", "worker", "running", "waiting", "pages", "tokens/s", "queue", "per token",
        "store failures",
    )  # fmt: skip
    for one in workers:
        pace = one["output_tokens_per_s"]
        table.add_row(
            one["name"], str(one["running"]), str(one["waiting"]),
            _percent(_share(one["kv_used_bytes"], one["kv_capacity_bytes"])),
            "-" if pace is None else f"{pace:.1f}", _ms(one["queue_s"]), _ms(one["tpot_s"]),
            str(one["store_failures"]),
        )  # fmt: skip
    return table


def _domains(domains: Sequence[Summary]) -> Table:
    table = _table("share domains", "domain", "prompt tokens", "hit rate", "output tokens")
    for one in domains:
        table.add_row(
            one["domain"], str(one["prompt_tokens"]), _percent(one["hit_rate"]),
            str(one["output_tokens"]),
        )  # fmt: skip
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    return table


def _has(page: Figures, prefix: str) -> bool:
    return any(name.startswith(prefix) for name, _, _ in page.samples())


def _domain(flow: Figures, domain: str, kind: str) -> float:
    return flow.total(_USAGE, domain=domain, kind=kind)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(flow: Figures, histogram: str, **labels: str) -> float | None:
    return _share(
        flow.total(f"{histogram}_sum", **labels), flow.total(f"{histogram}_count", **labels)
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1_000:.1f} ms"
