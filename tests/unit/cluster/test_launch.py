"""The driver's side of a start: what it waits for, and how it says that it is in vain."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from kvworkers.cluster.controller import Status
from kvworkers.cluster.launch import RunningCluster
from kvworkers.cluster.plan import Phase, Report, Role

from kvstore.core.errors import Unreachable

STARTING = Status(
    parts=(Report(name="worker-0", role=Role.WORKER, phase=Phase.STARTING, detail="loading"),),
    ready=False,
    hopeless="",
    members_version=0,
)


class RayError(Exception):
    pass


def cluster(*answers: Status | Exception) -> RunningCluster:
    """Return a cluster whose controller gives these answers, the last one for ever."""
    pending = list(answers)

    def get(reference: object, timeout: float) -> Status:
        answer = pending.pop(0) if len(pending) > 1 else pending[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    ray = SimpleNamespace(get=get, exceptions=SimpleNamespace(RayError=RayError))
    method: Any = SimpleNamespace(remote=lambda: None)
    return RunningCluster(ray, SimpleNamespace(status=method, stop=method))


def test_readiness_ends_the_wait_and_every_status_is_shown() -> None:
    shown: list[Status] = []
    ready = replace(STARTING, ready=True)
    assert cluster(STARTING, ready).wait_ready(shown.append) is ready
    assert shown == [STARTING, ready]


def test_a_hopeless_start_does_not_use_up_the_time() -> None:
    hopeless = replace(STARTING, hopeless="worker-0: no such model")
    with pytest.raises(Unreachable, match="worker-0: no such model"):
        cluster(hopeless).wait_ready()


def test_a_late_start_says_what_is_late() -> None:
    with pytest.raises(Unreachable, match="not ready in 0 s: worker-0 starting loading"):
        cluster(STARTING).wait_ready(seconds=0.05)


def test_a_controller_that_is_away_is_our_error() -> None:
    lost = cluster(RayError("gone"))
    for call in (lost.status, lost.endpoints, lost.stop, lambda: lost.part("worker-0")):
        with pytest.raises(Unreachable):
            call()


def test_parts_and_frontends_are_found_or_missed() -> None:
    assert cluster(STARTING).part("worker-0").detail == "loading"
    with pytest.raises(Unreachable, match="node-9"):
        cluster(STARTING).part("node-9")
    with pytest.raises(Unreachable, match="no frontend"):
        cluster(STARTING).endpoints()
