"""Decode plans that a captured graph can replay with other lengths, tables and tokens.

The work list has a fixed capacity and is cut on the device from lengths that lie there, so each
replay reads what the host has copied into `contexts` and `tables` since.
"""

import torch
from torch import Tensor

from kvkernels.plans import Rules
from kvkernels.triton import work as cutting
from kvkernels.triton.device import DevicePlan
from kvkernels.triton.launch import _processors, _programs
from kvstore.core.limits import BLOCK_TOKENS


class ReplayedDecode(DevicePlan):
    """One new token for each of `batch` rows; a row of context 0 is no work."""

    contexts: Tensor

    def __init__(self, batch: int, max_pages: int, device: torch.device) -> None:
        """`max_pages` bounds every row's table; memory for partial results grows with it."""
        longest = max_pages * BLOCK_TOKENS
        super().__init__(
            query_tokens=batch,
            tables=torch.zeros(batch, max_pages, dtype=torch.int32, device=device),
            spans=tuple((row, 1, longest) for row in range(batch)),
        )
        self.contexts = torch.ones(batch, dtype=torch.int32, device=device)

    def cut(self) -> None:
        """Queue the cutting of every work list made so far from `contexts`; capture it too."""
        rows = torch.arange(self.query_tokens, dtype=torch.int32, device=self.contexts.device)
        live = (self.contexts > 0).to(torch.int32)
        units = torch.stack([rows, rows, live, (self.contexts - 1).clamp(min=0)], dim=1)
        for (heads, _, dim, device, rules, _), work in self.works.items():
            assert isinstance(rules, Rules)
            programs = _programs(self.query_tokens * heads, dim, _processors(device))
            cutting.cut(
                units, work.items, programs=programs, heads=heads, rules=rules, tile=work.tile
            )
