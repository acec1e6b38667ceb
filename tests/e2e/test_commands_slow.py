"""The commands as users type them: the demonstration, Ctrl-C at any moment, the chat, bad input.

`kvworkers.commands.demo` runs with `kvworkers.demo.session` behind it.
"""

import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster_process import (
    KVSTORE,
    MARK,
    ClusterProcess,
    marked_processes,
)
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def marked() -> Iterator[dict[str, str]]:
    """An environment with a mark; nothing that carries it may outlive the test."""
    mark = secrets.token_hex(8)
    yield os.environ | {MARK: mark}
    assert not marked_processes(mark)


def test_the_demonstration_proves_itself(marked: dict[str, str]) -> None:
    done = subprocess.run(
        [*KVSTORE, "demo", "--clients", "4", "--turns", "2", "--json"],
        env=marked,
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *rows, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 8
    assert set(rows[0]) == {
        *("request", "client", "turn", "prompt_tokens", "cached", "ttft_ms", "tokens", "worker")
    }
    told = last["summary"]
    assert told["requests"] == told["equal_to_uncached"] == 8
    assert told["ttft_cold_ms"] > 5 * told["ttft_hit_ms"]
    assert told["hit_rate"]["hbm"] + told["hit_rate"]["dram"] > 0.5
    assert told["hit_rate"]["dram"] > 0, "no worker took a prefix out of the arena"
    assert {row["worker"] for row in rows} == {"worker-0", "worker-1"}
    assert "All 8 replies equal" in done.stderr


@pytest.mark.parametrize(
    "sign",
    ["", "model: ", "ray: starting", "ray: running", "worker-0: starting", "node-0: serving"],
)
def test_ctrl_c_at_any_moment_leaves_no_process(marked: dict[str, str], sign: str) -> None:
    """Press Ctrl-C when `sign` is on the screen: in a terminal it reaches the whole group."""
    process = subprocess.Popen(
        [*KVSTORE, "up", "--http", "127.0.0.1:0", "--name", f"test-{marked[MARK][:8]}"],
        env=marked,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    with process.stderr as screen:
        if sign:
            assert any(sign in line for line in screen), "it ended before"
        os.killpg(process.pid, signal.SIGINT)
        screen.read()
    status = process.wait(PATIENCE_S)
    # Before its first instruction Python itself ends by the signal.
    assert status in (130, -signal.SIGINT)
    assert not marked_processes(marked[MARK]), "the command was back before the last had ended"


def test_chat_works_from_a_pipe(cluster: ClusterProcess) -> None:
    questions = "What is a river?\nAnd what is a lake?\n/quit\nnever asked\n"
    done = subprocess.run(
        [*KVSTORE, "chat", "--name", cluster.name, "--max-tokens", "12", "--system", "Be brief."],
        input=questions,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    accounts = [line for line in done.stderr.splitlines() if "prompt tokens cached" in line]
    assert len(accounts) == 2
    assert "first token after" in accounts[0]
    assert accounts[1].split()[0] != "0", "the second turn found the first"
    assert len(done.stdout.strip()) > 20


def test_what_cannot_be_is_refused_in_one_line(cluster: ClusterProcess) -> None:
    wrong = {
        ("up", "--name", cluster.name, "--http", "127.0.0.1:0"): "--name",
        ("up", "--workers", "0", "--http", "127.0.0.1:0"): "--workers",
        ("up", "--arena", "1", "--http", "127.0.0.1:0"): "--arena",
        ("up", "--model", "/no/such/model", "--http", "127.0.0.1:0"): "/no/such/model",
        ("chat", "--url", "ftp://x"): "--url",
    }
    for arguments, at_fault in wrong.items():
        done = subprocess.run(
            [*KVSTORE, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode in (1, 2), arguments
        assert at_fault in done.stderr
        assert "Traceback" not in done.stderr


def test_down_without_a_cluster_says_so() -> None:
    done = subprocess.run(
        [*KVSTORE, "down", "--name", "no-such-cluster"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    assert "no-such-cluster" in done.stderr
