"""Decode plans that a captured graph can replay with other lengths, tables and tokens.

The work list has a fixed capacity and is cut on the device from lengths that lie there, so each
replay reads what the host has copied into `contexts` and `tables` since.
"""

import torch
from torch import Tensor

from kvkernels.plans import Rules
from kvkernels.triton.device import DevicePlan
from kvkernels.triton.works import Shape, Work, cut_into, unit_tokens
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
            replayed=True,
        )
        self.contexts = torch.ones(batch, dtype=torch.int32, device=device)

    def cut(self) -> None:
        """Queue the cutting of every work list made so far from `contexts`; capture it too."""
        rows = torch.arange(self.query_tokens, dtype=torch.int32, device=self.contexts.device)
        live = (self.contexts > 0).to(torch.int32)
        units = torch.stack(
            [rows * self.tables.stride(0), rows, live, (self.contexts - 1).clamp(min=0)], dim=1
        )
        for (shape, rules), works in self.works.items():
            _cut_again(units, self.query_tokens, shape, rules, works)


class ReplayedAppend(DevicePlan):
    """Up to `tokens` new tokens of one sequence; the rows beyond what there are do no work."""

    contexts: Tensor
    """int32 [2] on the device: tokens held after the step, and how many of them are new."""

    def __init__(self, tokens: int, max_pages: int, device: torch.device) -> None:
        """`max_pages` bounds the sequence's table."""
        super().__init__(
            query_tokens=tokens,
            tables=torch.zeros(1, max_pages, dtype=torch.int32, device=device),
            spans=((0, tokens, max_pages * BLOCK_TOKENS),),
            replayed=True,
        )
        self.contexts = torch.ones(2, dtype=torch.int32, device=device)

    def cut(self) -> None:
        """As `ReplayedDecode.cut`."""
        context, new = self.contexts[0], self.contexts[1]
        for (shape, rules), works in self.works.items():
            each = unit_tokens(self.query_tokens, shape)
            at = torch.arange(0, self.query_tokens, each, dtype=torch.int32, device=shape.device)
            at = at.flip(0)
            count = (new - at).clamp(0, each)
            units = torch.stack([torch.zeros_like(at), at, count, context - new + at], dim=1)
            _cut_again(units, at.shape[0], shape, rules, works)


def _cut_again(
    units: Tensor, count: int, shape: Shape, rules: Rules, works: tuple[Work, ...]
) -> None:
    (work,) = works  # Tables that change between replays are never cut by what they share.
    cut_into(units, count, work.items, shape, rules, rows=work.rows, tile=work.tile)
