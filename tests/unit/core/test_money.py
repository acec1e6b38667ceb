"""Prices: what memory and GPUs cost, and how long holding is worth it."""

import pytest

from kvstore.core.errors import BadInput
from kvstore.core.money import Prices, gpus_month, memory_month, worth_holding_s

GIB = 1 << 30


def test_a_month_of_memory_and_of_gpus() -> None:
    assert memory_month(3.0, 2 * GIB) == 6.0
    assert gpus_month(2.5, 4) == 2.5 * 730 * 4
    assert memory_month(None, GIB) is None
    assert gpus_month(None, 4) is None


def test_holding_is_worth_as_much_as_computing_again() -> None:
    """3.6 GPU seconds at 1000 an hour cost 1; a GiB at 730 a month costs 1 an hour."""
    seconds = worth_holding_s(recompute_gpu_s=3.6, size=GIB, gpu_hour=1000, gib_month=730)
    assert seconds == pytest.approx(3600)
    assert worth_holding_s(recompute_gpu_s=1, size=GIB, gpu_hour=None, gib_month=1) is None
    assert worth_holding_s(recompute_gpu_s=1, size=GIB, gpu_hour=1, gib_month=0) is None
    assert worth_holding_s(recompute_gpu_s=1, size=0, gpu_hour=1, gib_month=1) is None


def test_only_memory_of_its_own_has_a_price() -> None:
    prices = Prices(dram_gib_month=3.0, nvme_gib_month=0.1)
    assert [prices.per_gib_month(t) for t in ("dram", "nvme", "peer")] == [3.0, 0.1, None]


def test_a_negative_price_is_named() -> None:
    with pytest.raises(BadInput, match="nvme-gib-month"):
        Prices(nvme_gib_month=-1)
