"""docs/quickstart.md, run as it stands: every command and every line of Python, in order."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster_process import KVSTORE, marked_processes
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quickstart.md"


def blocks() -> list[tuple[str, str]]:
    """Return (language, text) of the page's blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which `kvstore` is this checkout's."""
    command = tmp_path / "kvstore"
    command.write_text(f'#!/bin/sh\nexec {" ".join(KVSTORE)} "$@"\n')
    command.chmod(0o755)
    mark = f"quickstart-{os.getpid()}"
    return os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "KVSTORE_TEST_MARK": mark, "NO_PROXY": "*",
    }  # fmt: skip


def test_the_page_works(environment: dict[str, str]) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("something serves on port 8000 already")
    printed: list[str] = []
    try:
        for language, text in blocks():
            command = ["bash", "-euo", "pipefail", "-c", text]
            if language == "python":
                command = [sys.executable, "-c", text]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
    finally:
        if marked_processes(environment["KVSTORE_TEST_MARK"]):
            subprocess.run([*KVSTORE, "down"], env=environment, timeout=PATIENCE_S, check=False)
    assert not marked_processes(environment["KVSTORE_TEST_MARK"]), "`down` ends everything"
    started, _, asked, looked, operated = printed
    assert "ready" in started.splitlines()[-1]
    first, second = (int(line.split()[0]) for line in asked.splitlines())
    assert second > 160 > first, "the handbook came out of the cache"
    assert "hit rate" in looked and '"role": "frontend"' in looked
    assert "restart: worker-0" in operated
