"""Every query of deploy/: of dashboards, alerts and rules, and what they speak of."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

ROOT: Final = Path(__file__).resolve().parents[1]
DASHBOARDS: Final = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
PROMETHEUS: Final = ROOT / "deploy" / "prometheus"
OPERATING: Final = ROOT / "docs" / "operating.md"


class Query(NamedTuple):
    """One expression, and where it stands."""

    where: str
    expression: str


def rules(kind: str) -> Iterator[dict[str, Any]]:
    """Iterate over the rules of one kind, `alert` or `record`."""
    for name in ("rules.yml", "alerts.yml"):
        for group in yaml.safe_load((PROMETHEUS / name).read_text())["groups"]:
            yield from (rule for rule in group["rules"] if kind in rule)


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over dashboards' panels with queries, with the dashboards' names."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            if panel["type"] != "row":
                yield path.stem, panel


def queries() -> list[Query]:
    """Return every query with Grafana's variables filled in."""
    found = [
        Query(f"{board}: {panel['title']}", _filled(target["expr"]))
        for board, panel in panels()
        for target in panel["targets"]
    ]
    found += [Query(rule["alert"], rule["expr"]) for rule in rules("alert")]
    found += [Query(rule["record"], rule["expr"]) for rule in rules("record")]
    return found


def without_verdict(expression: str) -> str:
    """Return an alert's expression with 0 or 1 in place of nothing or something.

    A healthy cluster answers an alert's own expression with nothing, as a wrong name does.
    """
    left, compared, right = re.fullmatch(r"(.*) ([<>]) ([\d.]+)", expression, re.DOTALL).groups()  # type: ignore[union-attr]
    return f"{left} {compared} bool {right}"


def _filled(expression: str) -> str:
    return expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
