"""A real Prometheus over a cluster of `kvstore up`, with our own files; and every query asked."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml
from kvworkers.demo.script import document

from tests.cluster_process import KVSTORE, eventually
from tests.patience import PATIENCE_S
from tests.prometheus_process import ask, prometheus_process
from tests.watching import PROMETHEUS, Query, queries, rules, without_verdict


def work(http: str, model: str) -> None:
    """Send prompts that share a long beginning."""
    opening = " ".join(document("moka").split()[:200])
    with httpx.Client(base_url=http, timeout=120, trust_env=False) as client:
        for question in ("Who?", "When?", "Where?"):
            body = {
                "model": model, "max_tokens": 8, "temperature": 0,
                "messages": [{"role": "user", "content": f"{opening} {question}"}],
            }  # fmt: skip
            assert client.post("/v1/chat/completions", json=body).status_code == 200


@contextmanager
def watching(cluster: str, directory: Path) -> Iterator[str]:
    """Run Prometheus over the cluster so named, looking every second; yields its address.

    `kvstore targets --follow` says where. What cannot wait is shortened: the hour before which
    the hit rate is compared becomes seconds.
    """
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    for name in config["rule_files"]:
        (directory / name).write_text(_soon((PROMETHEUS / name).read_text()))
    targets = directory / "targets" / "kvstore.json"
    targets.parent.mkdir()
    follow = ["targets", "--cluster", cluster, "--follow", str(targets), "--interval", "1"]
    follower = subprocess.Popen([*KVSTORE, *follow], stderr=subprocess.DEVNULL)
    try:
        eventually(targets.exists, what="the targets are written")
        with prometheus_process(directory) as address:
            yield address
    finally:
        follower.terminate()
        follower.wait(PATIENCE_S)


def check_every_query(address: str, *, parts: int, load: Callable[[], None]) -> None:
    """Fail where a query of deploy/ finds no data under `load`, or an alert fires."""
    alerts = {rule["alert"] for rule in rules("alert")}
    without = [
        Query(q.where, without_verdict(q.expression) if q.where in alerts else q.expression)
        for q in queries()
    ]
    eventually(lambda: len(ask(address, "up == 1")) == parts, what="all parts are up")
    deadline = time.monotonic() + PATIENCE_S
    while without and time.monotonic() < deadline:
        load()
        without = [query for query in without if not ask(address, _soon(query.expression))]
    assert not without, "\n".join(f"{where}: {query}" for where, query in without)
    firing = {alert["metric"]["alertname"] for alert in ask(address, "ALERTS")}
    assert not firing & alerts - {"KvstoreDiskNearlyFull"}, "a healthy cluster is calm"
    roles = {one["metric"]["role"] for one in ask(address, 'up{job="kvstore"}')}
    assert roles == {"node", "worker", "frontend", "controller"}


def _soon(text: str) -> str:
    return text.replace("offset 1h", "offset 3s")
