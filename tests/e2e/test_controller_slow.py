"""The controller is on no request's path: it may die, and comes back knowing everything."""

import contextlib
import os
import signal
from collections.abc import Iterator

import grpc
import pytest

from tests.cluster_process import ClusterProcess, cluster_process, eventually
from tests.e2e.test_cluster import live_workers
from tests.exactness import Reference
from tests.inference_client import generate

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterProcess]:
    """A cluster of this file's own: restarted parts are not where others expect them."""
    with cluster_process("--arena", "256MiB") as running:
        yield running


def test_requests_go_on_while_the_controller_is_away_and_it_heals_afterwards(
    cluster: ClusterProcess, reference: Reference
) -> None:
    prompt = reference.chat(("user", "Name a river."))
    expected = generate(cluster.grpc, prompt, max_tokens=8).tokens
    (controller,) = cluster.pids("ray::Controller")
    os.kill(controller, signal.SIGKILL)
    assert generate(cluster.grpc, prompt, max_tokens=8).tokens == expected
    eventually(
        lambda: [pid for pid in cluster.pids("ray::Controller") if pid != controller],
        what="Ray brings the controller back",
    )
    worker = cluster.pids("ray::WorkerShell")[0]
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: live_workers(cluster) == 1, what="frontends hear of the loss")
    assert generate(cluster.grpc, prompt, max_tokens=8).tokens == expected
    eventually(lambda: live_workers(cluster) == 2, what="the new controller heals it")


def test_a_frontend_that_dies_comes_back_and_serves(
    cluster: ClusterProcess, reference: Reference
) -> None:
    prompt = reference.chat(("user", "Name a lake."))
    expected = generate(cluster.grpc, prompt, max_tokens=8).tokens
    (frontend,) = cluster.pids("ray::FrontendShell")
    os.kill(frontend, signal.SIGKILL)
    eventually(
        lambda: [pid for pid in cluster.pids("ray::FrontendShell") if pid != frontend],
        what="Ray brings the frontend back",
    )

    def same_again() -> bool:
        with contextlib.suppress(grpc.RpcError):
            return generate(cluster.grpc, prompt, max_tokens=8).tokens == expected
        return False

    eventually(same_again, what="it serves at the same address")
