"""What is measured: batches of one shape over scattered pages, and what they must come out as."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvkernels import ops
from kvkernels.plans import AttentionPlan, Rules
from kvstore.core.limits import BLOCK_TOKENS

LAYERS: Final = 4
"""Layers of a page: launches go through them in turn, so that nothing is read from the L2 twice."""


_CAUSAL: Final = Rules()


@dataclass(frozen=True, slots=True)
class Cell:
    """One batch: query heads over KV heads, new tokens and context of each sequence."""

    name: str
    batch: int
    context: int
    heads: int = 8
    group: int = 4
    dim: int = 128
    new: int = 1
    rules: Rules = _CAUSAL
    peer_us: float | None = None
    """The best peer on an H100 whose measured read limit was 3,126 GB/s."""
    peer: str = ""

    @property
    def read_bytes(self) -> int:
        """Bytes of K and V that one launch has to read (bf16)."""
        seen = self.context if self.rules.window is None else min(
            self.context, self.rules.window + self.rules.sinks
        )  # fmt: skip
        return self.batch * seen * self.heads * self.dim * 2 * 2


GATE: Final = (
    Cell("decode b1 c8192", 1, 8_192, peer_us=18.8, peer="cuDNN paged"),
    Cell("decode b1 c32768", 1, 32_768, peer_us=54.6, peer="FlashAttention-3"),
    Cell("decode b8 c8192", 8, 8_192, peer_us=97.4, peer="FlashAttention-3"),
    Cell("decode b64 c1024", 64, 1_024, peer_us=96.4, peer="cuDNN paged"),
    Cell("decode b64 c8192", 64, 8_192, peer_us=708.0, peer="FlashAttention-3"),
    Cell("decode b256 c1024", 256, 1_024, peer_us=363.0, peer="cuDNN paged"),
    Cell("decode b8 c32768", 8, 32_768, peer_us=362.0, peer="FlashAttention-3"),
    Cell("decode group 3 d64 b64 c4096", 64, 4_096, heads=3, group=3, dim=64),
    Cell("decode MHA d128 b16 c4096", 16, 4_096, heads=32, group=1),
    Cell("decode MQA d128 b64 c8192", 64, 8_192, heads=1, group=8),
    Cell("decode d256 b32 c4096", 32, 4_096, heads=4, group=4, dim=256),
    Cell("decode window 4096 b64 c32768", 64, 32_768, rules=Rules(window=4_096, sinks=4)),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one cell on the device."""

    query: Tensor
    pages: Tensor
    tables: Tensor
    contexts: Tensor
    starts: Tensor


def make(cell: Cell, device: str) -> Batch:
    """Return random bf16 pages in random order; block tables on `device`, lengths on the host."""
    pages_each = -(-cell.context // BLOCK_TOKENS)
    total = pages_each * cell.batch
    shape = (total, cell.heads, LAYERS, 2, BLOCK_TOKENS, cell.dim)
    pages = torch.empty(shape, dtype=torch.bfloat16, device=device)
    step = max(1, (1 << 28) // pages[0].numel())
    for start in range(0, total, step):
        pages[start : start + step].normal_()
    order = torch.randperm(total).to(torch.int32).reshape(cell.batch, pages_each)
    query = torch.randn(
        cell.batch * cell.new, cell.heads * cell.group, cell.dim,
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    return Batch(
        query,
        pages,
        order.to(device),
        torch.full((cell.batch,), cell.context, dtype=torch.int32),
        torch.arange(cell.batch + 1, dtype=torch.int32) * cell.new,
    )


def attend(cell: Cell, batch: Batch, plan: AttentionPlan, layer: int) -> Tensor:
    """Launch the kernel on one layer of a batch."""
    return ops.paged_attention(
        batch.query,
        batch.pages,
        layer=layer,
        block_tables=batch.tables,
        context_lengths=batch.contexts,
        query_starts=batch.starts,
        scale=1 / math.sqrt(cell.dim),
        plan=plan,
        rules=cell.rules,
    )


def plan_of(batch: Batch) -> AttentionPlan:
    """Return what all launches over a batch share."""
    return ops.plan_attention(batch.tables, batch.contexts, batch.starts, device_type="cuda")


def expected(cell: Cell, batch: Batch, layer: int, sequences: Sequence[int]) -> Tensor:
    """Return attention of some sequences in float32, by the textbook."""
    scale = 1 / math.sqrt(cell.dim)
    out: list[Tensor] = []
    for row in sequences:
        chosen = batch.pages[batch.tables[row].long()][:, :, layer].float()
        key, value = (
            chosen[:, :, at].permute(1, 0, 2, 3).reshape(cell.heads, -1, cell.dim)
            for at in (0, 1)
        )  # fmt: skip
        query = batch.query[row * cell.new : (row + 1) * cell.new].float()
        query = query.reshape(cell.new, cell.heads, cell.group, cell.dim)
        scores = torch.einsum("thgd,hcd->hgtc", query, key[:, : cell.context]) * scale
        if cell.rules.softcap is not None:
            scores = cell.rules.softcap * torch.tanh(scores / cell.rules.softcap)
        hidden = ~_visible(cell, scores.device)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        answer = torch.einsum("hgtc,hcd->thgd", weights, value[:, : cell.context])
        out.append(answer.reshape(cell.new, -1, cell.dim))
    return torch.cat(out)


def _visible(cell: Cell, device: torch.device) -> Tensor:
    """Return which tokens each new one sees: bool [new, context]."""
    seen = torch.arange(cell.context - cell.new, cell.context, device=device)[:, None]
    spot = torch.arange(cell.context, device=device)[None]
    visible = spot <= seen
    if cell.rules.window is not None:
        visible &= (spot > seen - cell.rules.window) | (spot < cell.rules.sinks)
    return visible
