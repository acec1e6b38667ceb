"""What memory and compute cost, from prices that the caller gives. Pure.

The idea is Gray and Putzolu's five-minute rule (SIGMOD 1987) for KV blocks: a prefix is worth
holding in a tier for as long as holding costs less than one recomputation.
"""

from dataclasses import dataclass
from typing import Final

from kvstore.core.errors import BadInput

HOURS_PER_MONTH: Final = 730.0
_SECONDS_PER_MONTH: Final = HOURS_PER_MONTH * 3600
_GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Money in one currency; None where no price was given."""

    gpu_hour: float | None = None
    dram_gib_month: float | None = None
    nvme_gib_month: float | None = None

    def __post_init__(self) -> None:
        for name in ("gpu_hour", "dram_gib_month", "nvme_gib_month"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise BadInput(f"price {name.replace('_', '-')} is negative: {value}")

    def per_gib_month(self, tier: str) -> float | None:
        """Return the price of a tier's memory; None where it has none of its own."""
        return {"dram": self.dram_gib_month, "nvme": self.nvme_gib_month}.get(tier)


def memory_month(price_gib_month: float | None, size: int) -> float | None:
    """Return what `size` bytes cost a month."""
    return None if price_gib_month is None else price_gib_month * size / _GIB


def gpus_month(price_hour: float | None, gpus: int) -> float | None:
    """Return what `gpus` GPUs cost a month."""
    return None if price_hour is None else price_hour * HOURS_PER_MONTH * gpus


def worth_holding_s(
    *, recompute_gpu_s: float, size: int, gpu_hour: float | None, gib_month: float | None
) -> float | None:
    """Return the seconds between two uses up to which holding `size` bytes is the cheaper choice.

    `recompute_gpu_s` is GPU seconds, all ranks counted. None where a price is missing or zero.
    """
    if gpu_hour is None or not gib_month or not size:
        return None
    recompute = recompute_gpu_s / 3600 * gpu_hour
    return recompute / (gib_month * size / _GIB / _SECONDS_PER_MONTH)
