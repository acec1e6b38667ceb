"""Every alert fires on what it is for, after the time it says, and on nothing less: by promtool."""

import shutil
import subprocess
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import yaml

from tests.patience import PATIENCE_S
from tests.watching import PROMETHEUS, rules

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")


class Case(NamedTuple):
    """Series, by minute in promtool's notation, that make an alert fire; and that do not."""

    bad: dict[str, str]
    good: dict[str, str]
    at: str = "2h"


NODE: Final = 'instance="n:1"'
FAILED: Final = 'kvstore_requests_total{outcome="Unreachable"}'
SERVED: Final = 'kvstore_requests_total{outcome="stop"}'
LIVE: Final = 'kvstore_workers{state="live"}'
LATE: Final = 'kvstore_worker_queue_seconds_bucket{le="%s"}'
PROMISED: Final = 'kvstore_routed_hit_tokens_total{kind="predicted"}'
PROMPT, CACHED = "kvstore_prompt_tokens_total", 'kvstore_cached_tokens_total{tier="dram"}'
TOOK, EXPECTED = (f"kvstore_{one}_ttft_seconds_sum" for one in ("actual", "predicted"))
MISSED: Final = "kvstore_false_hit_tokens_total"
USED, FITS = (
    f'kvstore_tier_{what}_bytes{{tier="dram",{NODE}}}' for what in ("used", "capacity")
)  # fmt: skip
LEFT, DISK = (
    f'kvstore_tier_disk_{what}{{tier="nvme",{NODE}}}' for what in ("free_bytes", "bytes")
)  # fmt: skip
BREAKER: Final = f'kvstore_tier_breaker{{tier="nvme",operation="read",{NODE}}}'
UNWRITTEN: Final = f'kvstore_node_unwritten_blocks_total{{tier="nvme",reason="evicted",{NODE}}}'
STEADY, NEVER = "0+600x180", "0x180"

CASES: Final = {
    "KvstoreTargetDown": Case(
        {f'up{{job="kvstore",{NODE}}}': NEVER}, {f'up{{job="kvstore",{NODE}}}': "1x180"}
    ),
    "KvstoreNoWorker": Case({LIVE: NEVER}, {LIVE: "0x20 1x160"}),
    "KvstoreRequestsFail": Case(
        {FAILED: "0+6x180", SERVED: "0+60x180"}, {FAILED: "0+1x180", SERVED: "0+60x180"}
    ),
    "KvstoreRequestsWait": Case(
        {LATE % "5": "0+1x180", LATE % "10": "0+60x180", LATE % "+Inf": "0+60x180"},
        {LATE % "5": "0+60x180", LATE % "10": "0+60x180", LATE % "+Inf": "0+60x180"},
    ),
    "KvstorePredictionsOff": Case(
        {TOOK: "0+8x180", EXPECTED: "0+2x180"}, {TOOK: "0+4x180", EXPECTED: "0+2x180"}
    ),
    "KvstorePartsRestart": Case(
        {'kvstore_cluster_restarts_total{part="w"}': "0x100 1 2 3 4 5x80"},
        {'kvstore_cluster_restarts_total{part="w"}': "0x100 1 2x80"},
    ),
    "KvstoreHitRateDropped": Case(
        {PROMPT: STEADY, CACHED: "0+500x80 40000+50x100"}, {PROMPT: STEADY, CACHED: "0+500x180"}
    ),
    "KvstoreFalseHits": Case(
        {PROMISED: STEADY, MISSED: "0+120x180"}, {PROMISED: STEADY, MISSED: "0+30x180"}
    ),
    "KvstoreCorruptBlocks": Case(
        {f'kvstore_node_corrupt_blocks_total{{tier="dram",{NODE}}}': "0x100 1x80"},
        {f'kvstore_node_corrupt_blocks_total{{tier="dram",{NODE}}}': "7x180"},
    ),
    "KvstoreStoreUnreachable": Case(
        {f'kvstore_worker_store_failures_total{{call="acquire",{NODE}}}': "0+30x180"},
        {f'kvstore_worker_store_failures_total{{call="acquire",{NODE}}}': "0+1x180"},
    ),
    "KvstoreTierFull": Case({USED: "95x180", FITS: "100x180"}, {USED: "85x180", FITS: "100x180"}),
    "KvstoreDiskNearlyFull": Case(
        {LEFT: "4x180", DISK: "100x180"}, {LEFT: "6x180", DISK: "100x180"}
    ),
    "KvstoreBreakerOpen": Case({BREAKER: "2x180"}, {BREAKER: "1x180"}),
    "KvstoreDiskErrors": Case(
        {f'kvstore_tier_device_errors_total{{tier="nvme",{NODE}}}': "0x110 1x70"},
        {f'kvstore_tier_device_errors_total{{tier="nvme",{NODE}}}': "3x180"},
    ),
    "KvstoreWritesLost": Case({UNWRITTEN: "0+900x180"}, {UNWRITTEN: "0+60x180"}),
    "KvstoreMovesBreak": Case(
        {f'kvstore_node_failed_batches_total{{lane="load",{NODE}}}': "0x110 2x70"},
        {f'kvstore_node_failed_batches_total{{lane="load",{NODE}}}': NEVER},
    ),
}  # fmt: skip


def test_every_alert_has_a_case() -> None:
    assert set(CASES) == {rule["alert"] for rule in rules("alert")}


def expected(name: str, series: dict[str, str], *, at: str, fires: bool) -> dict[str, Any]:
    """Return one of promtool's tests: whether the alert fires at that time."""
    firing = {
        "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})',
        "eval_time": at,
        "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
    }
    return {
        "interval": "1m",
        "input_series": [{"series": one, "values": values} for one, values in series.items()],
        "promql_expr_test": [firing],
    }


def test_alerts_fire_on_what_they_are_for_and_on_nothing_less(tmp_path: Path) -> None:
    tests = [
        expected(name, series, at=case.at, fires=series is case.bad)
        for name, case in CASES.items()
        for series in (case.bad, case.good)
    ]
    files = [str(PROMETHEUS / name) for name in ("rules.yml", "alerts.yml")]
    described = {"rule_files": files, "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(described))
    done = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / "tests.yml")],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[:6_000]
