"""`kvstore bench router` on a small view; `bench_router_stream` runs over real gRPC."""

import json

import pytest

from kvstore.cli.main import run

FIELDS = [
    "bench", "case", "value", "unit", "limit", "limit_name", "ratio_to_limit", "peer",
    "peer_name", "ratio_to_peer", "runs",
]  # fmt: skip


def test_every_case_prints_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "router", "--quick", "--blocks", "2000", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 9
    for row in rows:
        assert list(row) == FIELDS
        assert row["bench"] == "router" and row["value"] > 0
        if row["case"] != "event published to visible over gRPC":
            assert row["limit"] > 0 and row["ratio_to_limit"] > 0 and row["limit_name"]


def test_a_pattern_without_a_case_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "router", "--blocks", "1000", "--case", "nothing*"]) == 2
    assert "is like no case" in capsys.readouterr().err
