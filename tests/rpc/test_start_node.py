"""Nodes for tests: ready when they say so, and gone when they are not wanted any more."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.core.errors import Unreachable
from kvstore.testing.node import new_run_dir, start_node
from tests.patience import until_so
from tests.processes import REPOSITORY


def lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_node_is_ready_described_and_then_gone() -> None:
    with start_node(arena_bytes=8 << 20, name="mine") as node:
        assert node.name == "mine"
        assert lives(node.keeper_pid)
        assert lives(node.node_pid)
        assert (node.run_dir / "keeper.sock").exists()
        assert len(str(node.run_dir)) < 60
        assert node.incarnation == 1
        assert node.listen.startswith("127.0.0.1:")
        assert node.metrics.startswith("127.0.0.1:")
        assert node.rpc == f"unix:{node.run_dir}/node.sock"
        pids = (node.keeper_pid, node.node_pid)
    assert not any(map(lives, pids))
    assert not node.run_dir.exists()


def test_a_node_that_cannot_start_says_why() -> None:
    with pytest.raises(Unreachable, match="arena-bytes"):
        start_node(arena_bytes=5)
    with pytest.raises(Unreachable, match="--nonsense"):
        start_node(options=("--nonsense",))


def test_a_failing_test_shows_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), start_node(arena_bytes=8 << 20):
        raise ZeroDivisionError
    assert "keeper.log" in capsys.readouterr().err


def test_a_given_directory_is_kept_and_used_again() -> None:
    run_dir = new_run_dir()
    try:
        for _ in range(2):
            with start_node(run_dir, arena_bytes=8 << 20) as node:
                assert node.run_dir == run_dir
            assert (run_dir / "cluster.key").exists()
    finally:
        subprocess.run(["rm", "-r", str(run_dir)], check=True)


def test_nothing_outlives_a_test_process_that_was_killed() -> None:
    script = (
        "import sys; from kvstore.testing.node import start_node\n"
        "node = start_node(arena_bytes=8 << 20)\n"
        "print(node.keeper_pid, node.node_pid, node.run_dir, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as test:
        assert test.stdout is not None
        keeper, node, run_dir = test.stdout.readline().split()
        assert lives(int(keeper))
        assert lives(int(node))
        os.kill(test.pid, signal.SIGKILL)
        until_so(lambda: not lives(int(keeper)) and not lives(int(node)))
    assert not Path(run_dir, "keeper.sock").exists()
    subprocess.run(["rm", "-r", run_dir], check=True)
