"""`kvstore bench`: rows, their ratios, and the router's cases on a small view."""

import json

import pytest

from kvstore.cli.bench_router import CASES
from kvstore.cli.bench_row import Row, pairs
from kvstore.cli.main import run

FIELDS = [
    "bench", "case", "value", "unit", "limit", "limit_name", "ratio_to_limit", "peer",
    "peer_name", "ratio_to_peer", "runs",
]  # fmt: skip


def test_a_row_has_the_fields_of_every_benchmark() -> None:
    row = Row(bench="b", case="c", value=1.23456, unit="us", runs=7)
    assert list(json.loads(row.to_json())) == FIELDS
    assert json.loads(row.to_json())["value"] == 1.235
    assert str(row) == "c: 1.235 us"


def test_pairs_are_interleaved_and_oriented_so_that_more_is_better() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        sum(range(200_000))

    def fast() -> None:
        order.append("fast")

    mine, theirs, ratio = pairs(slow, fast, runs=7)
    assert order == ["slow", "fast"] * 8
    assert mine > theirs
    assert ratio < 1


def test_every_case_of_the_router_prints_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "router", "--quick", "--blocks", "2000", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(CASES)
    for row in rows:
        assert list(row) == FIELDS
        assert row["bench"] == "router"
        assert row["value"] > 0 and row["limit"] > 0 and row["ratio_to_limit"] > 0
        assert row["limit_name"]


def test_a_pattern_without_a_case_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "router", "--case", "nothing*"]) == 2
    assert "no case matches 'nothing*'" in capsys.readouterr().err
