"""Dashboards and alerts speak of metrics that exist, and the manual of every alert.

That each query returns data is shown with a real Prometheus: tests/e2e/test_chaos_slow.py.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from kvstore.observe.metrics import (
    ClientMetrics,
    ClusterMetrics,
    NodeMetrics,
    RouterMetrics,
    TierMetrics,
    WorkerMetrics,
)
from tests.patience import PATIENCE_S
from tests.watching import DASHBOARDS, OPERATING, PROMETHEUS, queries, rules, without_verdict

BUNDLES = (ClientMetrics, ClusterMetrics, NodeMetrics, RouterMetrics, TierMetrics, WorkerMetrics)
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
OF_PROMETHEUS = {"instance", "job", "le", "quantile"}


def series() -> dict[str, set[str]]:
    """Return what can be asked for, with the labels it has."""
    found: dict[str, set[str]] = {}
    for bundle in BUNDLES:
        for metric in vars(bundle(CollectorRegistry())).values():
            for suffix in SUFFIXES[metric._type]:
                found[metric._name + suffix] = {*metric._labelnames, *OF_PROMETHEUS}
    return found


def test_every_query_asks_for_what_is_measured() -> None:
    known, recorded = series(), {rule["record"] for rule in rules("record")}
    assert len(queries()) > 60
    for where, expression in queries():
        asked = re.findall(r"kvstore[:\w]+", re.sub(r'"[^"]*"', '""', expression))
        assert asked or "up{" in expression, where
        for name in asked:
            assert name in known or name in recorded, f"{where}: {name}"
        names = re.findall(r"\b(kvstore_\w+)\{([^}]*)\}", expression)
        for name, matchers in names:
            labels = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)
            assert set(labels) <= known[name], f"{where}: {name} has no {labels}"


def test_every_grouping_is_by_labels_of_what_is_grouped() -> None:
    known = series()
    for where, expression in queries():
        every = {*OF_PROMETHEUS}
        for name in re.findall(r"kvstore_\w+", expression):
            every |= known.get(name, set())
        for grouped in re.findall(r"(?:by|ignoring|on) \(([^)]*)\)", expression):
            labels = {label.strip() for label in grouped.split(",")}
            assert labels <= every | {"tier"}, f"{where}: by {labels}"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_are_whole(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"] == path.stem and board["title"] and board["schemaVersion"] >= 39
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    covered: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & covered and at["x"] + at["w"] <= 24, panel["title"]
        covered |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}" and target["legendFormat"]


def test_every_alert_is_explained_and_nothing_else() -> None:
    alerts = [rule["alert"] for rule in rules("alert")]
    explained = re.findall(r"^### (Kvstore\w+)$", OPERATING.read_text(), re.MULTILINE)
    assert sorted(alerts) == sorted(explained) and len(alerts) == len(set(alerts))
    for rule in rules("alert"):
        assert rule["annotations"]["runbook"] == f"docs/operating.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert without_verdict(rule["expr"]) != rule["expr"]


def test_the_manual_says_what_and_what_to_do() -> None:
    sections = re.split(r"^### (?=Kvstore)", OPERATING.read_text(), flags=re.MULTILINE)[1:]
    for section in sections:
        body = section.split("\n## ")[0]
        assert "**Means**" in body and "**Do**" in body, body[:40]


def test_the_scrape_configuration_names_files_that_are_there() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    for name in config["rule_files"]:
        assert (PROMETHEUS / name).is_file()
    assert [one["job_name"] for one in config["scrape_configs"]] == ["kvstore"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_can_parse_every_query(tmp_path: Path) -> None:
    parsed = [
        {"record": f"query:{number}", "expr": query.expression}
        for number, query in enumerate(queries())
    ]
    every = tmp_path / "queries.yml"
    every.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": parsed}]}))
    files = [every, PROMETHEUS / "rules.yml", PROMETHEUS / "alerts.yml"]
    checked = subprocess.run(
        ["promtool", "check", "rules", *map(str, files)],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert f"{len(parsed)} rules found" in checked.stdout
