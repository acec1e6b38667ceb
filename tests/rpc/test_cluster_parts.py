"""The shells that Ray keeps alive, here without Ray: a real keeper, and starts that fail."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.parts import FrontendShell, NodeShell, Shell, WorkerShell
from kvworkers.cluster.plan import MemberList, Phase, Report
from kvworkers.cluster.rundir import new_run_dir
from kvworkers.cluster.state import started_ticks

from kvstore.cli.values import Address
from tests.byte_tokenizer import make_byte_tokenizer
from tests.patience import PATIENCE_S


@pytest.fixture
async def run_dir() -> AsyncIterator[Path]:
    path = new_run_dir()
    yield path
    for entry in sorted(path.rglob("*"), reverse=True):
        entry.rmdir() if entry.is_dir() else entry.unlink()
    path.rmdir()


def config(run_dir: Path, **changed: object) -> ClusterConfig:
    fields: dict[str, object] = {
        "model": run_dir / "no-model",
        "run_dir": run_dir,
        "arena_bytes": 64 << 20,
        "http": Address("127.0.0.1", 0),
    }
    return ClusterConfig(**fields | changed)  # type: ignore[arg-type]


async def until(shell: Shell, *phases: Phase, other_than: int = 0) -> Report:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            report = await shell.report()
            if report.phase in phases and report.incarnation != other_than:
                return report
            await asyncio.sleep(0.05)


def keeper_pid(shell: NodeShell) -> int:
    assert shell._keeper is not None
    return shell._keeper.pid


async def test_a_keeper_that_dies_comes_back_as_another_incarnation(run_dir: Path) -> None:
    shell = NodeShell("node-0", config(run_dir))
    assert (await shell.report()).phase is Phase.EMPTY
    assert (await shell.start(7, "node-0")).phase is Phase.STARTING
    first = await until(shell, Phase.SERVING, Phase.FAILED)
    assert first.phase is Phase.SERVING, first.detail
    assert first.incarnation == 7
    assert first.address.startswith("127.0.0.1:")
    pid = keeper_pid(shell)
    os.kill(pid, signal.SIGKILL)
    again = await until(shell, Phase.SERVING, other_than=7)
    assert again.incarnation > 7
    assert keeper_pid(shell) != pid
    last = keeper_pid(shell)
    await shell.stop()
    assert started_ticks(last) == 0


async def test_starting_twice_starts_once(run_dir: Path) -> None:
    shell = NodeShell("node-0", config(run_dir))
    await shell.start(1, "node-0")
    await shell.start(2, "node-0")
    assert (await until(shell, Phase.SERVING)).incarnation == 1
    await shell.stop()


async def test_a_worker_that_cannot_start_says_why(run_dir: Path) -> None:
    (run_dir / "node-0").mkdir()
    (run_dir / "node-0" / "node.json").write_text("{}")
    shell = WorkerShell("worker-0", config(run_dir))
    await shell.start(1, "node-0")
    report = await until(shell, Phase.FAILED, Phase.SERVING)
    assert "no-model" in report.detail
    await shell.stop()


async def test_a_worker_has_the_role_of_its_number(run_dir: Path) -> None:
    told = replace(config(run_dir), workers=3, prefill=1, decode=1, pool_bytes=1 << 20)
    servers = [WorkerShell(f"worker-{number}", told)._build() for number in range(3)]
    assert [server.config.role for server in servers] == ["decode", "both", "prefill"]
    assert servers[0].config.pool_bytes == 1 << 20
    assert WorkerShell("worker-0", config(run_dir))._build().config.pool_bytes is None


async def test_a_frontend_that_cannot_start_says_why(run_dir: Path) -> None:
    shell = FrontendShell("frontend-0", config(run_dir))
    await shell.start(1, "")
    report = await until(shell, Phase.FAILED, Phase.SERVING)
    assert report.phase is Phase.FAILED
    assert report.detail
    assert (await shell.set_members(MemberList(version=3))).members_version == 0
    await shell.stop()


async def test_a_drained_frontend_serves_no_more(run_dir: Path, tmp_path: Path) -> None:
    model = make_byte_tokenizer(tmp_path / "model")
    shell = FrontendShell("frontend-0", config(run_dir, model=model))
    await shell.start(1, "")
    report = await until(shell, Phase.SERVING)
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.get(f"http://{report.http}/v1/models")).status_code == 200
        await shell.drain(1_000)
        with pytest.raises(httpx.ConnectError):
            await http.get(f"http://{report.http}/v1/models")
    assert (await shell.report()).phase is Phase.SERVING, "until it is ended or started anew"
    await shell.stop()


async def test_a_new_disk_gets_its_directory_and_a_missing_one_is_named(
    run_dir: Path, tmp_path: Path
) -> None:
    for where, phase in (("disk", Phase.SERVING), ("no-disk/here", Phase.FAILED)):
        nvme = tmp_path / where
        shell = NodeShell("node-0", config(run_dir, nvme=nvme, nvme_bytes=64 << 20))
        await shell.start(1, "node-0")
        report = await until(shell, Phase.FAILED, Phase.SERVING)
        assert report.phase is phase, report.detail
        assert (nvme / "node-0").is_dir() if phase is Phase.SERVING else where in report.detail
        await shell.stop()


async def test_a_keeper_that_refuses_to_start_is_quoted(run_dir: Path) -> None:
    (run_dir / "node-0").write_text("a file where the directory should be")
    shell = NodeShell("node-0", config(run_dir))
    await shell.start(1, "node-0")
    report = await until(shell, Phase.FAILED, Phase.SERVING)
    assert report.phase is Phase.FAILED
    assert "keeper ended with status" in report.detail
    await shell.stop()


async def test_a_keeper_that_cannot_be_started_is_tried_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = asyncio.Event()
    launches = 0

    async def launch(self: NodeShell) -> None:
        nonlocal launches
        launches += 1
        if launches == 1:
            raise OSError("no more processes")
        again.set()

    monkeypatch.setattr(NodeShell, "_launch", launch)
    shell = NodeShell("node-0", config(run_dir))
    shell._keeper = await asyncio.create_subprocess_exec("true")
    keeping = asyncio.create_task(shell._keep())
    async with asyncio.timeout(PATIENCE_S):
        await again.wait()
    keeping.cancel()
