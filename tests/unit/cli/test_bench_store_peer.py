"""Every case of `bench store` over TCP, run once, small, between real nodes."""

import shutil
from pathlib import Path

import pytest

from kvstore.cli import bench_store_peer, bench_store_tls
from kvstore.cli.bench_rows import Bench


def test_reads_from_other_nodes_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_store_peer, "BATCH_BYTES", 4 << 20)
    monkeypatch.setattr(bench_store_peer, "_ARENA_BYTES", 64 << 20)
    monkeypatch.setattr(bench_store_peer, "_SIZES", (1,))
    one = Bench("store", "*", pairs=1, as_json=True)
    bench_store_peer.bench_peers(one, tmp_path)
    assert [row["case"] for row in one.rows] == [
        "remote get 1 MiB", "remote get single 1 MiB", "remote put 1 MiB", "peer read 1 MiB"
    ]  # fmt: skip
    assert all(row["value"] > 0 and row["ratio_to_limit"] > 0 for row in one.rows)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_tls_is_measured_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_store_peer, "BATCH_BYTES", 4 << 20)
    monkeypatch.setattr(bench_store_tls, "SIZES", (1,))
    one = Bench("store", "*", pairs=1, as_json=True)
    bench_store_tls.bench_tls(one, tmp_path)
    assert [row["case"] for row in one.rows] == ["remote get over TLS 1 MiB"]
    assert all(row["value"] > 0 and row["ratio_to_limit"] > 0 for row in one.rows)


def test_without_openssl_tls_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    one = Bench("store", "*", pairs=1, as_json=True)
    bench_store_tls.bench_tls(one, tmp_path)
    assert one.rows == []
    assert "TLS is not measured" in capsys.readouterr().err
