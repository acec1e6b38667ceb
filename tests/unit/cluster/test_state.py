"""The note of a running cluster: unique, verified by the process's start, cleaned when stale."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from kvworkers.cluster import rundir
from kvworkers.cluster.state import StateFile, started_ticks

from kvstore.core.errors import BadInput, NotFound


def test_a_claim_is_found_and_dropped(tmp_path: Path) -> None:
    file = StateFile(tmp_path, "one")
    state = file.claim(tmp_path / "run")
    assert not state.ready
    file.write(state.with_endpoints(http="http://127.0.0.1:1", grpc="", model="m", parts=[]))
    assert file.running().ready
    file.drop(state)
    with pytest.raises(NotFound, match="one"):
        file.running()
    assert not list(tmp_path.iterdir())


def test_a_name_in_use_cannot_be_claimed_again(tmp_path: Path) -> None:
    StateFile(tmp_path, "one").claim(tmp_path)
    with pytest.raises(BadInput, match="--name one"):
        StateFile(tmp_path, "one").claim(tmp_path)


def test_a_number_given_to_another_process_counts_as_gone(tmp_path: Path) -> None:
    file = StateFile(tmp_path, "one")
    state = file.claim(tmp_path)
    file.write(replace(state, started=state.started - 1))
    with pytest.raises(NotFound):
        file.running()
    assert not file.path.exists(), "a stale note stays no longer"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "one"}'])
def test_a_torn_note_is_stale(tmp_path: Path, content: str) -> None:
    file = StateFile(tmp_path, "one")
    file.path.write_text(content)
    assert file.claim(tmp_path).pid == os.getpid()


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "x" * 33, "-a", "a b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="--name"):
        StateFile(tmp_path, name)


def test_a_zombie_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert started_ticks(child.pid) == 0
    child.wait()


def test_run_directories_are_private_and_short() -> None:
    path = rundir.new_run_dir()
    try:
        assert path.stat().st_mode & 0o077 == 0
        assert path.parent.stat().st_mode & 0o077 == 0
        assert len(str(path)) < 40
    finally:
        path.rmdir()


def test_directories_of_ranks_that_were_killed_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "user_dir", lambda: tmp_path)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    names = {"dead": f"ranks-{child.pid}-a", "fresh": f"ranks-{child.pid}-b",
             "alive": f"ranks-{os.getpid()}-c", "other": "0a1b2c3d"}  # fmt: skip
    for what, name in names.items():
        (tmp_path / name).mkdir()
        if what != "fresh":  # a process that we do not see may be another container's
            os.utime(tmp_path / name, (0, 0))
    (tmp_path / "ranks-1-gone").symlink_to(tmp_path / "nowhere")
    whole = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        if path.name == "ranks-1-gone":
            path.unlink()  # Another worker that starts sweeps too.
        return whole(path)

    monkeypatch.setattr(Path, "lstat", lstat)
    path = rundir.new_ranks_dir()
    assert path.stat().st_mode & 0o077 == 0 and len(path.name) < 30
    left = {entry.name for entry in tmp_path.iterdir()} - {path.name}
    assert left == {names["fresh"], names["alive"], names["other"]}
