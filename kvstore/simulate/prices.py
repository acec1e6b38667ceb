"""What moving and computing cost in a simulated cluster: bandwidths and a model's prefill."""

from dataclasses import dataclass
from typing import Final

from kvstore.core.errors import BadInput
from kvstore.router.score import Pace
from kvstore.simulate.replay import BYTES_PER_TOKEN

HBM, DRAM, NVME, PEER, POOL = "hbm", "dram", "nvme", "peer", "pool"
TIERS: Final = (HBM, DRAM, NVME, PEER, POOL)
"""Where a block can be found, seen from one worker; nearest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Rates of one kind of worker and host.

    Defaults: an 8-billion-parameter model with 32 layers of 4096 on one H100. A token costs
    16 GFLOP and, at position p, 4 · 32 · 4096 · p FLOP of attention: as much again at p = 30,500.
    """

    bytes_per_token: int = BYTES_PER_TOKEN
    prefill_tokens_per_s: float = 25_000.0
    """At position 0."""
    doubling_tokens: float = 30_500.0
    """Position at which attention makes a token cost twice as much as at 0."""
    dram_gb_per_s: float = 50.0
    """DRAM to HBM; 1 GB is 1e9 bytes."""
    nvme_gb_per_s: float = 6.0
    peer_gb_per_s: float = 10.0
    pool_gb_per_s: float = 5.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise BadInput(f"{name} is {getattr(self, name)}, not above 0")

    def compute_s(self, tokens: int, position_tokens: int) -> float:
        """Return the seconds to compute `tokens` that start at `position_tokens`.

        Asks the router's own model, so that simulation and routing price alike.
        """
        linear = 1 / self.prefill_tokens_per_s
        pace = Pace(linear, linear / self.doubling_tokens)
        return pace.between(position_tokens, position_tokens + tokens)

    def load_s(self, tier: str, size: int) -> float:
        """Return the seconds to bring `size` bytes from a tier into a worker's pages."""
        if tier == HBM:
            return 0.0
        rates = {
            DRAM: self.dram_gb_per_s,
            NVME: self.nvme_gb_per_s,
            PEER: self.peer_gb_per_s,
            POOL: self.pool_gb_per_s,
        }
        # Hops overlap in 8-layer groups, so the slowest one counts.
        return size / (1e9 * min(rates[tier], self.dram_gb_per_s))
