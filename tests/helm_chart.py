"""Helm itself, on a chart: `python -m tests.helm_chart DIRECTORY RELEASE`, values on stdin.

A process of its own: Helm's library brings Go's runtime, whose signal handlers and threads do not
belong among other tests.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest

from tests.patience import PATIENCE_S

_ROOT: Final = Path(__file__).resolve().parents[1]
WARNING: Final = 2
"""Helm's severities: 1 is a recommendation, 3 an error."""


@dataclass(frozen=True)
class Rendered:
    """What Helm says of a chart with these values. `refused`: why it renders nothing."""

    version: str
    findings: list[dict[str, Any]]
    templates: dict[str, str]
    refused: str


def helm(chart: Path, values: dict[str, Any], *, release: str = "kvstore") -> Rendered:
    """Lint a chart and render it; skips the test where Helm's library is not installed."""
    if find_spec("helm_python") is None:
        pytest.skip("needs helm-python-sdk, of the extra `dev`")
    done = subprocess.run(
        [sys.executable, "-m", "tests.helm_chart", str(chart), release],
        cwd=_ROOT, input=json.dumps(values), capture_output=True, text=True, timeout=PATIENCE_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Rendered(**json.loads(done.stdout))


def main() -> None:
    """Print one object; values come as JSON on standard input."""
    helm_python: Any = import_module("helm_python")
    chart_directory, release = sys.argv[1:]
    values = json.load(sys.stdin)
    linted = helm_python.lint(chart_directory)
    found = [*linted["messages"], *({"severity": 3, "error": str(e)} for e in linted["errors"])]
    templates: dict[str, str] = {}
    refused = ""
    with helm_python.Chart.load(chart_directory) as chart:
        try:
            chart.validate_schema(values)
            templates = chart.render(values, name=release, namespace="default")
        except helm_python.HelmError as error:
            refused = str(error)
    made = Rendered(helm_python.helm_sdk_version(), found, templates, refused)
    sys.stdout.write(json.dumps(made.__dict__))


if __name__ == "__main__":
    main()
