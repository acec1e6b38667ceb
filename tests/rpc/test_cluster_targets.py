"""`kvstore targets` asks a cluster's controller: parts that were restarted have other ports."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.operate import ClusterService, Operator
from kvworkers.cluster.placing import Placer
from kvworkers.cluster.plan import Part, Phase, Report, Role
from kvworkers.cluster.stage import Stage
from prometheus_client import CollectorRegistry

from kvstore.cli.targets import Target, find_targets
from kvstore.observe.metrics import ClusterMetrics
from kvstore.rpc.channel import listen, make_server
from kvstore.rpc.v1 import cluster_pb2_grpc


@pytest.fixture
def note() -> Iterator[Path]:
    """Where `kvstore up` notes a cluster of this test's own name."""
    path = Path(f"/tmp/kvstore-{os.getuid()}") / f"up-t{os.getpid()}c.json"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    yield path
    path.unlink(missing_ok=True)


def write(note: Path, control: str) -> str:
    """Note a cluster as it stood at its start; returns its name."""
    parts = [
        {"name": "worker-0", "role": "worker", "address": "x", "metrics": "127.0.0.1:1"},
        {"name": "controller", "role": "controller", "address": control, "metrics": "127.0.0.1:2"},
    ]
    note.write_text(json.dumps({"http": "http://127.0.0.1:3", "parts": parts}))
    return note.stem.removeprefix("up-")


@pytest.fixture
async def control() -> AsyncIterator[str]:
    """A controller's port; yields its address."""
    config = ClusterConfig(model=Path("m"), run_dir=Path("r"))
    stage = Stage(config, Placer(config))
    again = Report(name="worker-0", role=Role.WORKER, phase=Phase.SERVING, metrics="127.0.0.1:11")
    stage.parts["worker-0"] = Part(name="worker-0", role=Role.WORKER, report=again)
    stage.parts["worker-1"] = Part(name="worker-1", role=Role.WORKER)
    service = ClusterService(
        stage, Operator(stage, ClusterMetrics(CollectorRegistry())),
        ready=lambda: True, hopeless=str, metrics="127.0.0.1:12",
    )  # fmt: skip
    server, _ = make_server()
    cluster_pb2_grpc.add_ClusterServicer_to_server(service, server)
    address = listen(server, "127.0.0.1:0")
    await server.start()
    yield address
    await server.stop(0)


async def test_where_parts_are_now_is_asked_of_the_controller(note: Path, control: str) -> None:
    name = write(note, control)
    assert await asyncio.to_thread(find_targets, [], name) == [
        Target("worker-0", "worker", "127.0.0.1:11", "http"),
        Target("controller", "controller", "127.0.0.1:12", "http"),
    ]


def test_without_its_answer_the_note_counts(note: Path) -> None:
    assert [target.address for target in find_targets([], write(note, "127.0.0.1:1"))] == [
        "127.0.0.1:1", "127.0.0.1:2",
    ]  # fmt: skip


async def test_while_it_is_away_the_last_answer_counts(note: Path, control: str) -> None:
    last = await asyncio.to_thread(find_targets, [], write(note, control))
    again = await asyncio.to_thread(lambda: find_targets([], write(note, "127.0.0.1:1"), last=last))
    assert again == last and again[0].address == "127.0.0.1:11"
