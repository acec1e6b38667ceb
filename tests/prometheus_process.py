"""A real Prometheus for tests, from the `prometheus` package of Debian or from PATH."""

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster_process import eventually
from tests.patience import PATIENCE_S


@contextmanager
def prometheus_process(directory: Path) -> Iterator[str]:
    """Run Prometheus on `prometheus.yml` of a directory; yields its address once it answers."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed")
    log = (directory / "log").open("wb")
    process = subprocess.Popen(
        [binary, "--config.file=prometheus.yml", "--storage.tsdb.path=data",
         "--web.listen-address=127.0.0.1:0"],
        cwd=directory, stdout=log, stderr=log,
    )  # fmt: skip
    try:
        address = f"http://{eventually(lambda: _listening(directory), what='a port')}"
        eventually(lambda: _ready(address), what="Prometheus has loaded its data")
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        log.close()


def _listening(directory: Path) -> str:
    """Return the address that Prometheus says it listens on."""
    found = re.search(r"(?:Listening on\W+address=)(127[\d.:]+)", (directory / "log").read_text())
    return found[1] if found else ""


def _ready(address: str) -> bool:
    """Say whether Prometheus answers queries yet: it listens before it has read its data."""
    return httpx.get(f"{address}/-/ready", timeout=PATIENCE_S, trust_env=False).status_code == 200


def ask(address: str, expression: str) -> list[dict[str, Any]]:
    """Return the result of a query; fails where it is none."""
    query = urllib.parse.urlencode({"query": expression})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{address}/api/v1/query?{query}", timeout=PATIENCE_S) as reply:
        answer = json.load(reply)
    assert answer["status"] == "success", expression
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found
