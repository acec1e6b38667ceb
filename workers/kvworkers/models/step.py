"""The inputs of one step: several sequences' new tokens, flattened into one ragged batch."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.core.errors import BadInput
from kvstore.core.limits import BLOCK_TOKENS
from kvworkers.stream.gate import Gate


@dataclass(frozen=True, slots=True)
class Carried:
    """Tokens that a step takes from the one before it, which the host has not seen yet."""

    chosen: Tensor
    """int64 [rows of the step before]: what was chosen, where the model computes."""
    sources: Tensor
    """int64 [T] on the host: the row for each token; -1 where `tokens` has it."""

    def into(self, tokens: Tensor) -> Tensor:
        """Return `tokens`, on the device, with those that are carried in their places."""
        sources = on_device(self.sources, tokens.device)
        return torch.where(sources >= 0, self.chosen[sources.clamp(min=0)], tokens)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on `device` without waiting for what is queued there.

    A copy from memory that is not pinned may wait for the whole stream.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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
    carried: Carried | None = None
    """Where some of `tokens` come from the step before; any number stands in their places."""
    gates: tuple[Gate, ...] = ()
    """Loads that are still bringing in what the step attends to, layer by layer."""

    def on(self, device: torch.device) -> "StepInputs":
        """Return the step with what kernels read on `device`.

        Lengths and starts stay on the host: the attention plan is made from them there, and asking
        a GPU for them would wait for it.
        """
        if device.type == "cpu":
            carried = self.carried
            return self if carried is None else replace(self, tokens=carried.into(self.tokens))
        tokens = on_device(self.tokens, device)
        return replace(
            self,
            tokens=tokens if self.carried is None else self.carried.into(tokens),
            positions=on_device(self.positions, device),
            slots=on_device(self.slots, device),
            block_tables=on_device(self.block_tables, device),
            sample_rows=on_device(self.sample_rows, device),
        )

    def pass_layer(self, layer: int) -> None:
        """Hold the thread or stream that computes until what `layer` attends to is there."""
        for gate in self.gates:
            gate.pass_layer(layer)

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
            ("tokens", self.tokens.numpy(), vocab_size),
            ("positions", self.positions.numpy(), max_model_tokens),
            ("slots", self.slots.numpy(), pages * BLOCK_TOKENS),
            ("sample_rows", self.sample_rows.numpy(), total),
            ("block_tables", self._used_pages(), pages),
        ):
            if tensor.size and not (0 <= (low := int(tensor.min())) and int(tensor.max()) < end):
                raise BadInput(
                    f"step {name} reach from {low} to {int(tensor.max())}; [0, {end}) allowed"
                )

    def _used_pages(self) -> NDArray[np.int32]:
        """Return the table entries that the context lengths reach, flattened."""
        tables: NDArray[np.int32] = self.block_tables.numpy()
        used = np.arange(tables.shape[1]) * BLOCK_TOKENS
        return tables[used[None, :] < self.context_lengths.numpy()[:, None]]
