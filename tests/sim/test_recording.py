"""Recordings as traces (`kvstore.simulate.recording`) and `kvstore record` on a real node."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.cli.main import run
from kvstore.core.errors import BadInput
from kvstore.simulate.formats import read_trace
from kvstore.simulate.recording import TraceWriter
from kvstore.testing.node import RunningNode, start_node
from tests.patience import PATIENCE_S
from tests.processes import REPOSITORY
from tests.session_process import PAYLOAD, connect, names_of


def _write(writer: TraceWriter, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        writer.write(number, first_block=2, blocks=[1, number + 2], block_tokens=16)


def test_what_is_written_is_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl.gz"
    with TraceWriter(path, file_bytes=1 << 20, files=2) as writer:
        _write(writer, 5)
    trace = read_trace(path)
    assert (trace.name, trace.block_tokens, len(trace.requests)) == ("live", 16, 5)
    assert (trace.unique_blocks, trace.input_tokens) == (6, 5 * 32)
    assert trace.requests[3].first_block == 2 and trace.requests[3].timestamp_ms == 3


def test_files_are_bounded_in_size_and_number(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl.gz"
    with TraceWriter(tmp_path / "one.jsonl.gz", file_bytes=1 << 20, files=1) as writer:
        _write(writer, 1, first=10)
    line = len(gzip.decompress((tmp_path / "one.jsonl.gz").read_bytes()))
    (tmp_path / "one.jsonl.gz").unlink()
    with TraceWriter(path, file_bytes=2 * line, files=3) as writer:
        _write(writer, 10, first=10)
        assert writer.requests == 10
    names = ["live.jsonl.gz", "live.1.jsonl.gz", "live.2.jsonl.gz"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    times = [[r.timestamp_ms for r in read_trace(tmp_path / name).requests] for name in names]
    assert times == [[18, 19], [16, 17], [14, 15]]


def test_one_file_keeps_the_latest(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl.gz"
    with TraceWriter(path, file_bytes=1, files=1) as writer:
        _write(writer, 3)
    assert [r.timestamp_ms for r in read_trace(path).requests] == [2]


def test_an_empty_recording_leaves_nothing(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "live.jsonl.gz", file_bytes=1, files=1):
        pass
    assert not list(tmp_path.iterdir())


def test_names_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    there = tmp_path / "there.jsonl.gz"
    there.touch()
    for path, complaint in (
        (there, "exists"),
        (tmp_path / "a.json", "does not end"),
        (tmp_path / "none" / "a.jsonl.gz", "No such"),
    ):
        with pytest.raises(BadInput, match=complaint):
            TraceWriter(path, file_bytes=1, files=1)


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=16 << 20) as running:
        yield running


@contextmanager
def _recording(arguments: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    """Run `kvstore record` and wait until it records; killed where the test did not end it."""
    paths = [str(REPOSITORY / part) for part in ("", "workers", "kernels")]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstore.cli.main", "record", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert first == "recording\n", first + process.stderr.read()
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def test_a_running_nodes_accesses_become_a_trace_that_replays(
    node: RunningNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "live.jsonl.gz"
    with (
        connect(node.run_dir, "recorded") as client,
        _recording(["--run-dir", str(node.run_dir), "--out", str(out), "--json"]) as process,
    ):
        chat, other = names_of(client, 1, 6), names_of(client, 2, 3)
        client.put(chat[:4], [bytes(PAYLOAD)] * 4)
        client.get(other)
        client.get(chat)
        client.acquire(chat[4:], first_block=4)
        client.lookup(chat)  # not an access: nothing is leased
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert json.loads(printed) == {"out": str(out), "requests": 4, "dropped": 0}
    trace = read_trace(out)
    assert trace.block_tokens == 16
    put, missed, got, rest = (request.blocks for request in trace.requests)
    assert [len(put), len(missed), len(got), len(rest)] == [4, 3, 6, 2]
    assert got[:4] == put and got[4:] == rest and not set(missed) & set(got)
    assert trace.requests[3].first_block == 4
    text = gzip.decompress(out.read_bytes()) + printed.encode()
    for name in chat:
        assert name.hex().encode() not in text
        assert str(int.from_bytes(name[:8], "little")).encode() not in text
    assert run(["simulate", "evict", str(out), "--policy", "lru", "--fraction", "1", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["block_hit"] == pytest.approx((4 + 2) / 15)


def test_a_recording_ends_after_its_seconds(node: RunningNode, tmp_path: Path) -> None:
    out = tmp_path / "live.jsonl.gz"
    arguments = ["--node", node.listen, "--out", str(out), "--seconds", "0.2"]
    with _recording(arguments) as process:
        _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0 and told == f"{out}: 0 requests, 0 dropped\n"
    assert not out.exists()


def test_what_was_recorded_is_kept_when_the_node_dies(tmp_path: Path) -> None:
    out = tmp_path / "live.jsonl.gz"
    with (
        start_node(arena_bytes=16 << 20) as node,
        connect(node.run_dir, "dying") as client,
        _recording(["--run-dir", str(node.run_dir), "--out", str(out)]) as process,
    ):
        client.acquire(names_of(client, 1, 3))
        _wait_for_text(out)
        node.kill_node()
        _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and told.startswith("kvstore: ")
    assert read_trace(out, block_tokens=16).block_refs == 3


def _wait_for_text(path: Path, deadline_s: float = PATIENCE_S) -> None:
    ends = time.monotonic() + deadline_s
    while b"hash_ids" not in zlib.decompressobj(wbits=31).decompress(path.read_bytes()):
        assert time.monotonic() < ends, "nothing was written"
        time.sleep(0.01)


def test_a_node_that_is_not_there_is_an_error_and_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "live.jsonl.gz")
    assert run(["record", "--out", out]) == 2
    assert run(["record", "--out", out, "--run-dir", str(tmp_path)]) == 2
    assert run(["record", "--out", out, "--node", "127.0.0.1:1"]) == 1
    err = capsys.readouterr().err
    assert "either --run-dir or --node" in err and "no node has written node.json" in err
    assert not list(tmp_path.iterdir())
