"""What a replay asks for, and that it runs over a real engine, node and trace."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from kvworkers.bench.command import worker
from kvworkers.bench.replay import Plan, plan_replay

from kvstore.core.errors import BadInput
from kvstore.simulate.formats import read_trace
from kvstore.simulate.trace import Trace

TRACE = Path(__file__).resolve().parents[2] / "data" / "traces" / "lmcache_agent.jsonl.gz"


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(TRACE)


def plan(trace: Trace, *, seed: int = 1, requests: int = 60, most_tokens: int = 512) -> Plan:
    return plan_replay(
        trace, requests=requests, block_tokens=16, most_tokens=most_tokens, vocab=199, seed=seed
    )


def test_the_same_seed_asks_for_the_same_and_another_for_others(trace: Trace) -> None:
    assert plan(trace) == plan(trace)
    assert plan(trace).sessions != plan(trace, seed=2).sessions
    assert plan(trace).requests == 60


def test_prompts_begin_alike_as_far_as_the_traces_blocks_do(trace: Trace) -> None:
    scaled = plan(trace, requests=200, most_tokens=10_000)
    by_length: dict[int, set[tuple[int, ...]]] = {}
    for session in scaled.sessions:
        for ask in session:
            for blocks in range(1, len(ask.tokens) // 16 + 1):
                by_length.setdefault(blocks, set()).add(tuple(ask.tokens[: 16 * blocks]))
    # As many different beginnings as the trace's own chosen requests have: by their keys.
    firsts = {request.blocks[0] for request in trace.requests if request.input_tokens >= 64}
    assert 1 <= len(by_length[1]) <= len(firsts)
    long = max(scaled.sessions, key=len)
    shared = [alike(one.tokens, then.tokens) for one, then in pairwise(long)]
    assert max(shared) >= 16, "a turn goes on from the one before it"


def alike(one: list[int], other: list[int]) -> int:
    """Return how many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def test_what_is_too_long_loses_its_end_and_is_counted(trace: Trace) -> None:
    short = plan(trace, most_tokens=64)
    assert short.cut > 0
    for session in short.sessions:
        for ask in session:
            assert 2 <= len(ask.tokens) and len(ask.tokens) + ask.out <= 64 and ask.out >= 1
    whole = plan(trace, most_tokens=100_000)
    assert whole.cut == 0
    for mine, full in zip(short.sessions, whole.sessions, strict=True):
        for one, other in zip(mine, full, strict=True):
            assert other.tokens[: len(one.tokens)] == one.tokens


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"requests": 1}, "two requests"),
        ({"block_tokens": 24}, "multiple of 16"),
        ({"most_tokens": 16}, "32 are needed"),
    ],
)
def test_sizes_that_give_no_prompt_are_refused(
    trace: Trace, sizes: dict[str, int], match: str
) -> None:
    asked = {"requests": 4, "block_tokens": 16, "most_tokens": 64, "vocab": 199, "seed": 0}
    with pytest.raises(BadInput, match=match):
        plan_replay(trace, **{**asked, **sizes})


@pytest.mark.timeout(120)
def test_the_command_replays_a_trace_over_every_tier_it_is_given(tmp_path: Path) -> None:
    options = (
        "--trace", str(TRACE), "--model", "smollm2-135m", "--layers", "1", "--requests", "24",
        "--block-tokens", "16", "--streams", "2", "--pages", "24", "--seed", "3", "--json",
        "--nvme", str(tmp_path / "nvme"), "--nvme-bytes", str(128 << 20),
    )  # fmt: skip
    said = CliRunner().invoke(worker, options, catch_exceptions=False)
    rows = {row["case"]: row for row in map(json.loads, said.stdout.splitlines())}
    name = "replay lmcache_agent"
    shares = {
        place: rows[f"{name}: from {place}"]["value"]
        for place in ("own pages", "arena", "nvme", "recomputed")
    }
    assert abs(sum(shares.values()) - 1) < 0.01
    # Of one layer a block is computed sooner than it is loaded: what comes from below may be none.
    assert shares["own pages"] > 0.2 and shares["recomputed"] < 0.8
    assert rows[f"{name}: replies equal"]["value"] == 1
    for measured in ("TTFT p50", "TTFT p90", "throughput"):
        row = rows[f"{name}: {measured}"]
        assert row["value"] > 0 and row["peer"] > 0 and row["runs"] == 24
