"""A real Prometheus scrapes a real cluster: every dashboard, rule and alert finds its data.

`kvstore top` and `kvstore
targets` look at the same cluster, through their real entry.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from kvworkers.demo.script import document

from tests.cluster_process import KVSTORE, ClusterProcess, cluster_process, eventually
from tests.prometheus_process import ask, prometheus_process
from tests.watching import PROMETHEUS, Query, queries, rules, without_verdict

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    """A cluster with a disk below its memory, that has answered a few requests."""
    disk = tmp_path_factory.mktemp("nvme")
    options = ("--arena", "256MiB", "--nvme", str(disk), "--nvme-bytes", "1GiB", "--workers", "2")
    with cluster_process(*options) as cluster:
        work(cluster)
        yield cluster


def work(cluster: ClusterProcess) -> None:
    """Send prompts that share a long beginning."""
    opening = " ".join(document("moka").split()[:200])
    with httpx.Client(base_url=cluster.http, timeout=120) as client:
        for question in ("Who?", "When?", "Where?"):
            body = {
                "model": cluster.model, "max_tokens": 8, "temperature": 0,
                "messages": [{"role": "user", "content": f"{opening} {question}"}],
            }  # fmt: skip
            assert client.post("/v1/chat/completions", json=body).status_code == 200


def kvstore(*arguments: str) -> str:
    done = subprocess.run(
        [*KVSTORE, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def prometheus(cluster: ClusterProcess, directory: Path) -> Iterator[str]:
    """Run Prometheus with our own files, looking every second; yields its address.

    What cannot wait is shortened: the hour before which the hit rate is compared becomes seconds.
    """
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    for name in config["rule_files"]:
        (directory / name).write_text(soon((PROMETHEUS / name).read_text()))
    (directory / "targets").mkdir()
    listed = kvstore("targets", "--cluster", cluster.name)
    (directory / "targets" / "kvstore.json").write_text(listed)
    with prometheus_process(directory) as address:
        yield address


def soon(text: str) -> str:
    return text.replace("offset 1h", "offset 3s")


def test_every_query_returns_data(watched: ClusterProcess, tmp_path: Path) -> None:
    alerts = {rule["alert"] for rule in rules("alert")}
    asked = [
        Query(q.where, without_verdict(q.expression) if q.where in alerts else q.expression)
        for q in queries()
    ]
    with prometheus(watched, tmp_path) as address:
        eventually(lambda: len(ask(address, "up == 1")) == 5, seconds=30, what="all targets are up")
        deadline = time.monotonic() + 60
        without = asked
        while without and time.monotonic() < deadline:
            work(watched)
            without = [query for query in without if not ask(address, soon(query.expression))]
        assert not without, "\n".join(f"{where}: {query}" for where, query in without)
        firing = {alert["metric"]["alertname"] for alert in ask(address, "ALERTS")}
        assert not firing & alerts - {"KvstoreDiskNearlyFull"}, "a healthy cluster is calm"
        roles = {one["metric"]["role"] for one in ask(address, 'up{job="kvstore"}')}
        assert roles == {"node", "worker", "frontend", "controller"}


def test_top_shows_the_cluster(watched: ClusterProcess) -> None:
    shown = json.loads(kvstore("top", "--once", "--json", "--cluster", watched.name))
    assert [tier["tier"] for tier in shown["nodes"][0]["tiers"]] == ["dram", "nvme"]
    assert shown["nodes"][0]["tiers"][1]["used_bytes"] > 0
    assert len(shown["workers"]) == 2 and shown["unreachable"] == []
    assert shown["requests"]["hit_rate"] > 0.3
    assert shown["domains"][0]["domain"] == "default"
    drawn = kvstore("top", "--once", "--cluster", watched.name)
    assert "hit rate" in drawn and "nvme" in drawn and "closed" in drawn and "\x1b" not in drawn
