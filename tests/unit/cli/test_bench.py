"""`kvstore bench`: rows, choice of cases, and every case of `bench store` run once, small."""

import asyncio
import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvstore.cli import bench_store, bench_store_disk, bench_store_index, bench_store_node
from kvstore.cli.bench import ENTRY_POINT_GROUP, bench
from kvstore.cli.bench_rows import Bench
from kvstore.cli.main import run
from kvstore.cli.missing import missing

ROW = {
    "bench", "case", "value", "unit", "limit", "limit_name", "ratio_to_limit", "peer",
    "peer_name", "ratio_to_peer", "runs",
}  # fmt: skip


async def test_a_row_is_the_median_of_interleaved_pairs() -> None:
    mine, other, order = iter([9.0, 0.2, 0.1, 0.4]), iter([9.0, 0.1, 0.1, 0.1]), []

    async def ours() -> float:
        order.append("ours")
        return next(mine)

    async def limit() -> float:
        order.append("limit")
        return next(other)

    one = Bench("store", pairs=3, as_json=True)
    await one.against("case", ours, limit, limit_name="the other", amount=2.0, unit="GB/s")
    assert order == ["ours", "limit"] * 4, "a warm-up and three pairs"
    (row,) = one.rows
    assert row.keys() == ROW
    assert (row["value"], row["limit"], row["unit"]) == (10.0, 20.0, "GB/s")
    assert row["ratio_to_limit"] == 0.5, "below 1 is worse than the limit"


async def test_without_an_amount_the_value_is_microseconds() -> None:
    async def work() -> None:
        await asyncio.sleep(0.001)

    one = Bench("store", pairs=1, as_json=True)
    await one.against("case", work, work, limit_name="itself", repeat=2)
    assert 900 < one.rows[0]["value"] < 1e6
    assert one.rows[0]["unit"] == "us"


async def test_only_cases_that_are_asked_for_run() -> None:
    async def never() -> None:
        raise AssertionError("not asked for")

    one = Bench("store", "get *", as_json=True)
    await one.against("acquire 1", never, never, limit_name="")
    assert one.rows == []
    assert one.wants("acquire 1", "get in place 1 MiB")


def test_people_get_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    one = Bench("store")
    one.row("case a", 12.3456789, "us", limit=6.0, limit_name="an echo", ratio=0.486)
    one.row("case b", 1.0, "s")
    one.finish()
    out = capsys.readouterr().out
    assert "12.346 us" in out and "0.49" in out and "an echo" in out


def test_a_case_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "store", "--case", "nonsense"]) == 2
    assert "'nonsense' is like no case" in capsys.readouterr().err


def test_benchmarks_are_listed() -> None:
    out = CliRunner().invoke(bench, ["--help"]).output
    assert "store" in out


def test_a_real_node_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "store", "--quick", "--json", "--case", "acquire 1"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row.keys() == ROW
    assert row["case"] == "acquire 1" and row["value"] > 0 and row["ratio_to_limit"] > 0


def test_the_index_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Bench("store", "[nm]*", pairs=1, quick=True, as_json=True)
    monkeypatch.setattr(bench_store_index, "_QUICK_BLOCKS", 6_000)
    bench_store_index.bench_index(one, tmp_path)
    values = {row["case"]: row["value"] for row in one.rows}
    assert set(values) == {*bench_store_index._CASES, bench_store_index._SCATTERED}
    assert all(value > 0 for value in values.values())


def test_without_fio_the_disk_has_no_limit_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(bench_store_disk, "_BLOCKS", 4)
    one = Bench("store", "nvme*", pairs=1, as_json=True)
    asyncio.run(bench_store_disk.bench_disk(one, tmp_path))
    assert [row["case"] for row in one.rows] == ["nvme write 2 MiB", "nvme read 2 MiB"]
    assert [row["limit"] for row in one.rows] == [None, None]


def test_the_parts_know_their_cases() -> None:
    cases = {*bench_store._CALLS, *bench_store._BLOCKS}
    assert len(cases) == len(bench_store._CALLS) + len(bench_store._BLOCKS)
    assert bench_store_node._acquire_reply_bytes(2048) > bench_store_node._acquire_reply_bytes(1)


def test_a_benchmark_that_cannot_run_here_is_listed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = EntryPoint("engine", "kvstore_absent.bench:engine", ENTRY_POINT_GROUP)
    monkeypatch.setattr("kvstore.cli.bench.entry_points", lambda group: [absent])
    out = CliRunner().invoke(bench, ["--help"]).output
    assert "engine" in out and "store" in out
    assert run(["bench", "engine"]) == 2
    assert "not installed (kvstore_absent)" in capsys.readouterr().err
    stand_in = missing("engine", ModuleNotFoundError("no", name="torch"))
    assert "torch" in str(stand_in.short_help)
