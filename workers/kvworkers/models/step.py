"""The inputs of one step: several sequences' new tokens, flattened into one ragged batch."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvstore.core.errors import BadInput
from kvstore.core.limits import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What one forward pass computes. T new tokens of S' sequences, S rows to sample.

    Sequence i owns tokens `[query_starts[i], query_starts[i + 1])`; its last row is its last
    token, so its positions end at `context_lengths[i] - 1`.
    """

    tokens: Tensor
    """int64 [T]: token ids."""
    positions: Tensor
    """int64 [T]: positions in their sequence, from 0."""
    slots: Tensor
    """int64 [T]: page * 16 + offset, where K and V of each new token go; unique."""
    block_tables: Tensor
    """int32 [S', max_pages]: the sequences' pages in order; the rest of a row is ignored."""
    context_lengths: Tensor
    """int32 [S']: tokens each sequence holds after this step."""
    query_starts: Tensor
    """int32 [S' + 1]: where each sequence's tokens start, and T."""
    sample_rows: Tensor
    """int64 [S]: rows of the batch whose logits are wanted; may be empty."""

    def on(self, device: torch.device) -> "StepInputs":
        """Return the step with what kernels read on `device`.

        Lengths and starts stay on the host: the attention plan is made from them there, and asking
        a GPU for them would wait for it.
        """
        if device.type == "cpu":
            return self
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            slots=self.slots.to(device, non_blocking=True),
            block_tables=self.block_tables.to(device, non_blocking=True),
            sample_rows=self.sample_rows.to(device, non_blocking=True),
        )

    def check(self, *, pages: int, vocab_size: int, max_model_tokens: int) -> None:
        """Raise `BadInput` naming the field whose values lie outside pool or model.

        Kernels trust indices, so this is the one place that looks at them: a wrong one would
        write into another sequence's page.
        """
        total = self.tokens.shape[0]
        if total == 0 or self.positions.shape[0] != total or self.slots.shape[0] != total:
            raise BadInput(
                f"a step needs as many positions and slots as tokens, and one at least: "
                f"{total}, {self.positions.shape[0]}, {self.slots.shape[0]}"
            )
        for name, tensor, end in (
            ("tokens", self.tokens, vocab_size),
            ("positions", self.positions, max_model_tokens),
            ("slots", self.slots, pages * BLOCK_TOKENS),
            ("sample_rows", self.sample_rows, total),
            ("block_tables", self._used_pages(), pages),
        ):
            if tensor.numel() and not (0 <= int(tensor.min()) and int(tensor.max()) < end):
                raise BadInput(
                    f"step {name} reach from {int(tensor.min())} to {int(tensor.max())}; "
                    f"[0, {end}) allowed"
                )

    def _used_pages(self) -> Tensor:
        """Return the table entries that the context lengths reach, flattened."""
        count = self.block_tables.shape[1]
        used = torch.arange(count, device=self.block_tables.device) * BLOCK_TOKENS
        return self.block_tables[used[None, :] < self.context_lengths[:, None]]
