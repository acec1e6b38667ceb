"""Readers of traces (`kvstore.simulate.formats`, `trace`): what they accept and refuse."""

import gzip
import itertools
from pathlib import Path
from typing import Any

import pytest

from kvstore.core.errors import BadInput
from kvstore.simulate.formats import read_trace, stream_requests
from kvstore.simulate.trace import Trace, mixed
from tests.sim.traces import sample, trace_of, write_lines

GOOD: dict[str, Any] = {
    "timestamp_ms": 5,
    "input_length": 40,
    "output_length": 3,
    "hash_ids": [0, 1, 2],
}


@pytest.mark.parametrize(
    ("name", "block_tokens", "requests", "blocks", "refs"),
    [
        ("mooncake_conversation", 512, 1_500, 30_634, 41_702),
        ("lmcache_agent", 64, 783, 3_218, 35_682),
        ("ragpulse", 64, 1_000, 31_286, 45_752),
        ("weka_cc_a", 512, 300, 4_736, 50_394),
    ],
)
def test_samples_are_read_whole(
    name: str, block_tokens: int, requests: int, blocks: int, refs: int
) -> None:
    trace = read_trace(sample(name))
    assert (trace.name, trace.block_tokens) == (name, block_tokens)
    assert (len(trace.requests), trace.unique_blocks, trace.block_refs) == (requests, blocks, refs)
    assert trace.input_tokens == sum(request.input_tokens for request in trace.requests)


def test_our_fields(tmp_path: Path) -> None:
    row = GOOD | {"session": 7, "turn": 2, "type": "chat", "first_block": 3}
    (request,) = stream_requests(write_lines(tmp_path / "t.jsonl", [row]))
    assert (request.timestamp_ms, request.input_tokens, request.output_tokens) == (5.0, 40, 3)
    assert (request.session, request.turn, request.kind, request.first_block) == ("7", 2, "chat", 3)
    assert request.blocks == [mixed(0), mixed(1), mixed(2)]


def test_mooncakes_fields(tmp_path: Path) -> None:
    row = {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
    (request,) = stream_requests(write_lines(tmp_path / "t.jsonl", [row]))
    assert (request.timestamp_ms, request.input_tokens) == (27482.0, 6955)
    assert (request.session, request.turn, request.kind) == ("", 0, "")


def test_dynamos_sessions_count_turns_and_add_delays(tmp_path: Path) -> None:
    lengths = {"input_tokens": 16, "output_tokens": 1}
    rows = [
        {"session_id": "a", "created_time": 100.5, "hash_ids": [1], **lengths},
        {"session_id": "b", "timestamp": 150, "hash_ids": [2], **lengths},
        {"session_id": "a", "delay": 1000, "hash_ids": [1], **lengths},
        {"session_id": "a", "delay_ms": 10, "hash_ids": [1], **lengths},
    ]
    trace = read_trace(write_lines(tmp_path / "t.jsonl", rows), block_tokens=16)
    seen = [(r.session, r.turn, r.timestamp_ms) for r in trace.requests]
    assert seen == [("a", 1, 100.5), ("b", 1, 150.0), ("a", 2, 1100.5), ("a", 3, 1110.5)]


def test_requests_are_put_in_order_of_time_and_limited(tmp_path: Path) -> None:
    rows = [GOOD | {"timestamp_ms": at} for at in (30, 10, 20)]
    path = write_lines(tmp_path / "t.jsonl", rows)
    assert [r.timestamp_ms for r in read_trace(path).requests] == [10, 20, 30]
    assert len(read_trace(path, limit=2).requests) == 2


def test_gzip_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "t.jsonl", [GOOD])
    packed = tmp_path / "t"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_trace(packed).requests == read_trace(plain).requests


def test_streaming_does_not_read_ahead(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [GOOD, GOOD, "rubbish"])
    assert len(list(itertools.islice(stream_requests(path), 2))) == 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hash_ids": None}, "hash_ids is not a list"),
        ({"hash_ids": [1, "2", 3]}, "hash_ids is not a list of whole numbers"),
        ({"hash_ids": [1, True, 3]}, "hash_ids is not a list of whole numbers"),
        ({"hash_ids": [1, 2, 1]}, "a block stands twice"),
        ({"hash_ids": [1, -2, 3]}, "not negative"),
        ({"hash_ids": [1, 1 << 64, 3]}, "64 bits"),
        ({"hash_ids": list(range(65_537))}, "65537 hash_ids, at most 65536"),
        ({"hash_ids": []}, "40 tokens and no hash_ids"),
        ({"input_length": -1}, "input_length -1 is not a count"),
        ({"input_length": None}, "none of input_length, input_tokens"),
        ({"output_length": 1.5}, "output_length 1.5 is not a count"),
        ({"timestamp_ms": "now"}, "timestamp_ms 'now' is not a number"),
        ({"timestamp_ms": float("nan")}, "timestamp_ms nan is not a number"),
        ({"timestamp_ms": None}, "none of timestamp_ms, timestamp, created_time"),
        ({"timestamp_ms": None, "session_id": "x", "delay": 4}, "none of timestamp_ms"),
        ({"session": [1]}, "session is neither"),
        ({"turn": -1}, "turn -1 is not a count"),
        ({"type": 3}, "type is not a text"),
        ({"first_block": -1}, "first_block -1 is not a count"),
    ],
)
def test_a_malformed_field_is_named_with_file_and_line(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    path = write_lines(tmp_path / "bad.jsonl", [GOOD, GOOD | change])
    with pytest.raises(BadInput, match=complaint) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(("line", "complaint"), [("{", "not JSON"), ("[]", "list instead of")])
def test_a_line_that_is_no_object_is_refused(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(BadInput, match=rf"bad\.jsonl:2: .*{complaint}"):
        read_trace(path)


def test_files_that_are_missing_empty_or_cut_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere"):
        read_trace(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(BadInput, match="no requests"):
        read_trace(empty)
    cut = tmp_path / "cut.gz"
    cut.write_bytes(sample("lmcache_agent").read_bytes()[:9_000])
    with pytest.raises(BadInput, match=r"cut\.gz"):
        read_trace(cut)


def test_tokens_of_a_block_must_follow_or_be_said(tmp_path: Path) -> None:
    unclear = write_lines(tmp_path / "t.jsonl", [GOOD | {"input_length": 5, "hash_ids": [1]}])
    with pytest.raises(BadInput, match="--block-tokens"):
        read_trace(unclear)
    assert read_trace(unclear, block_tokens=16).block_tokens == 16
    rows: list[dict[str, Any]] = [{"input_length": 144}, {"input_length": 63, "hash_ids": [4]}]
    odd = write_lines(tmp_path / "odd", [GOOD | row for row in rows])
    assert read_trace(odd).block_tokens == 64
    # 141 tokens in 3 blocks: at least 47 each; 94 in 3: below 47.
    odd = write_lines(tmp_path / "odd", [GOOD | {"input_length": n} for n in (141, 94)])
    with pytest.raises(BadInput, match="at least 47, below 47"):
        read_trace(odd)


def test_a_request_longer_than_its_blocks_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [GOOD])
    with pytest.raises(BadInput, match="request 1 has 40 tokens in 3 blocks of 8"):
        read_trace(path, block_tokens=8)


def test_capacity_is_a_share_of_unique_blocks() -> None:
    trace = trace_of([range(200), range(100)])
    assert [trace.capacity(f) for f in (0.001, 0.1, 1.0)] == [1, 20, 200]
    for fraction in (0.0, -0.1, 1.5):
        with pytest.raises(BadInput, match="fraction"):
            trace.capacity(fraction)


def test_an_empty_trace_is_none() -> None:
    with pytest.raises(BadInput, match="no requests"):
        Trace("empty", 16, [])
    with pytest.raises(BadInput, match="0 tokens a block"):
        Trace("odd", 0, trace_of([[1]]).requests)


def test_mixed_keys_are_distinct_and_use_all_bits() -> None:
    keys = [mixed(number) for number in range(4_096)]
    assert len(set(keys)) == len(keys)
    for bit in range(64):
        assert 1_700 < sum(key >> bit & 1 for key in keys) < 2_400
