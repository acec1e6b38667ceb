"""`kvstore top` over a real cluster with a disk below its memory, through its real entry."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster_process import KVSTORE, ClusterProcess, cluster_process
from tests.prometheus_queries import work

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    """A cluster that has answered a few requests."""
    disk = tmp_path_factory.mktemp("nvme")
    options = ("--arena", "256MiB", "--nvme", str(disk), "--nvme-bytes", "1GiB", "--workers", "2")
    with cluster_process(*options) as cluster:
        work(cluster.http, cluster.model)
        yield cluster


def kvstore(*arguments: str) -> str:
    done = subprocess.run(
        [*KVSTORE, *arguments], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_top_shows_the_cluster(watched: ClusterProcess) -> None:
    shown = json.loads(kvstore("top", "--once", "--json", "--cluster", watched.name))
    assert [tier["tier"] for tier in shown["nodes"][0]["tiers"]] == ["dram", "nvme"]
    assert shown["nodes"][0]["tiers"][1]["used_bytes"] > 0
    assert len(shown["workers"]) == 2 and shown["unreachable"] == []
    assert shown["requests"]["hit_rate"] > 0.3
    assert shown["domains"][0]["domain"] == "default"
    drawn = kvstore("top", "--once", "--cluster", watched.name)
    assert "hit rate" in drawn and "nvme" in drawn and "closed" in drawn and "\x1b" not in drawn


def test_top_finds_a_worker_again_that_came_back_on_another_port(watched: ClusterProcess) -> None:
    def place() -> str:
        listed = json.loads(kvstore("targets", "--cluster", watched.name))
        return next(str(t["targets"][0]) for t in listed if t["labels"]["part"] == "worker-0")

    before = place()
    kvstore("restart", "worker-0", "--name", watched.name)
    shown = json.loads(kvstore("top", "--once", "--json", "--cluster", watched.name))
    assert len(shown["workers"]) == 2 and shown["unreachable"] == []
    assert place() != before
