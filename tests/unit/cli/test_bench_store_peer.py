"""Every case of `bench store` over TCP, run once, small, between real nodes."""

from pathlib import Path

import pytest

from kvstore.cli import bench_store_peer
from kvstore.cli.bench_rows import Bench


@pytest.mark.timeout(60)
def test_reads_from_other_nodes_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_store_peer, "_BATCH_BYTES", 4 << 20)
    monkeypatch.setattr(bench_store_peer, "_ARENA_BYTES", 64 << 20)
    monkeypatch.setattr(bench_store_peer, "_SIZES", (1,))
    one = Bench("store", "*", pairs=1, as_json=True)
    bench_store_peer.bench_peers(one, tmp_path)
    assert [row["case"] for row in one.rows] == [
        "remote get 1 MiB", "remote get single 1 MiB", "remote put 1 MiB", "peer read 1 MiB"
    ]  # fmt: skip
    assert all(row["value"] > 0 and row["ratio_to_limit"] > 0 for row in one.rows)
