"""MLA decode: batches over scattered pages of latents, and what they must come out as."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from kvkernels import latent, ops
from kvkernels.plans import AttentionPlan
from kvstore.core.errors import Corrupt
from kvstore.core.layout import LatentLayout
from kvstore.core.limits import BLOCK_TOKENS

LATENT: Final = 512
ROPE: Final = 64
SCALE: Final = 1 / math.sqrt(192)
"""DeepSeek-V3's: before absorption a head has 128 dimensions and 64 rotary ones."""

TOLERANCE: Final = 5e-3
"""Relative error (norms) of bf16 outputs; rounding them alone makes 1.7e-3 of it."""

PEER_LIMIT_GB_S: Final = 3_126.0
"""Measured read limit of the H100 on which FlashMLA's times were taken."""

_ROTATED_BYTES: Final = 256 << 20
"""Launches go through layers that are this large together: several times the L2."""

_BY_PRODUCTS: Final = 64
"""Heads from which a full batch is bound by arithmetic, and counted in TFLOP/s."""

_CHECKED_TOKENS: Final = 8
"""New tokens whose scores are written out at once: in float64 they are large."""


@dataclass(frozen=True, slots=True)
class LatentCell:
    """One batch: query heads, contexts of its sequences, new tokens of each."""

    name: str
    heads: int
    contexts: tuple[int, ...]
    new: int = 1
    peer_us: float | None = None
    """FlashMLA on an H100 whose measured read limit was 3,126 GB/s."""

    @property
    def read_bytes(self) -> int:
        """Bytes of latents that one launch has to read."""
        return sum(self.contexts) * (LATENT + ROPE) * 2

    @property
    def products(self) -> int:
        """Return floating-point operations of one launch: what new tokens see, no more."""
        pairs = sum(
            self.new * context - self.new * (self.new - 1) // 2 for context in self.contexts
        )
        return 2 * self.heads * (2 * LATENT + ROPE) * pairs

    @property
    def layers(self) -> int:
        """Layers of a page: so many that nothing is read from the L2 twice."""
        return max(2, min(64, -(-_ROTATED_BYTES // self.read_bytes)))


_RAGGED: Final = tuple(range(256, 16_640, 256))

GATE: Final = (
    *(
        LatentCell(f"mla h{heads} b{batch} c{context}", heads, (context,) * batch, peer_us=peer_us)
        for heads, batch, context, peer_us in (
            (16, 1, 8_192, 29.7),
            (16, 8, 32_768, 120.3),
            (16, 64, 8_192, 220.2),
            (16, 128, 4_096, 215.0),
            (128, 1, 8_192, 32.5),
            (128, 1, 131_072, 100.0),
            (128, 8, 8_192, 61.4),
            (128, 64, 8_192, 253.1),
            (128, 64, 32_768, 1_014.5),
            (128, 128, 1_024, 88.8),
        )
    ),
    LatentCell("mla h128 ragged 64", 128, _RAGGED),
    LatentCell("mla h16 ragged 64", 16, _RAGGED),
)


@dataclass(frozen=True, slots=True)
class LatentBatch:
    """Tensors of one cell on the device; index tensors on the host."""

    query: Tensor
    rotary: Tensor
    pages: Tensor
    tables: Tensor
    contexts: Tensor
    starts: Tensor


def make(cell: LatentCell, device: str) -> LatentBatch:
    """Return random pages in random order on `device`."""
    counts = [-(-context // BLOCK_TOKENS) for context in cell.contexts]
    layout = LatentLayout(layers=cell.layers, latent_dim=LATENT, rope_dim=ROPE)
    pool = torch.empty(sum(counts), layout.block_bytes, dtype=torch.uint8, device=device)
    pages = latent.latent_view(pool, layout)
    for start in range(0, len(pages), 4_096):
        pages[start : start + 4_096].normal_()
    order = torch.randperm(len(pages)).to(torch.int32)
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    taken = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[taken : taken + count]
        taken += count
    tokens = len(counts) * cell.new
    query = torch.randn(tokens, cell.heads, LATENT + ROPE, dtype=torch.bfloat16, device=device)
    return LatentBatch(
        query[..., :LATENT],
        query[..., LATENT:],
        pages,
        tables,
        torch.tensor(cell.contexts, dtype=torch.int32),
        torch.arange(len(counts) + 1, dtype=torch.int32) * cell.new,
    )


def plan_of(batch: LatentBatch) -> AttentionPlan:
    """Return what all launches over a batch share."""
    return ops.plan_attention(
        batch.tables, batch.contexts, batch.starts, device_type=batch.pages.device.type
    )


def attend(batch: LatentBatch, plan: AttentionPlan, layer: int) -> Tensor:
    """Launch the kernel on one layer of a batch."""
    return latent.latent_attention(
        batch.query,
        batch.rotary,
        batch.pages,
        layer=layer,
        block_tables=batch.tables,
        context_lengths=batch.contexts,
        query_starts=batch.starts,
        scale=SCALE,
        plan=plan,
    )


def expected(cell: LatentCell, batch: LatentBatch, layer: int, sequences: Sequence[int]) -> Tensor:
    """Return attention of some sequences in float64, by the textbook, of what the pages hold."""
    out: list[Tensor] = []
    for row in sequences:
        context = cell.contexts[row]
        table = batch.tables[row, : -(-context // BLOCK_TOKENS)].long()
        keys = batch.pages[table.to(batch.pages.device), layer].flatten(0, 1)[:context].double()
        spot = torch.arange(context, device=keys.device)
        for start in range(0, cell.new, _CHECKED_TOKENS):
            stop = min(start + _CHECKED_TOKENS, cell.new)
            chosen = slice(row * cell.new + start, row * cell.new + stop)
            query = torch.cat((batch.query[chosen], batch.rotary[chosen]), -1).double()
            scores = torch.einsum("thd,cd->thc", query, keys) * SCALE
            seen = torch.arange(start, stop, device=keys.device) + context - cell.new
            scores.masked_fill_((spot[None] > seen[:, None])[:, None], float("-inf"))
            out.append(scores.softmax(-1) @ keys[:, :LATENT])
    return torch.cat(out)


def check(cell: LatentCell, batch: LatentBatch, got: Tensor, layer: int) -> None:
    """Compare two sequences with the oracle; raises `Corrupt` naming the error."""
    rows = sorted({0, len(cell.contexts) - 1})
    want = expected(cell, batch, layer, rows)
    mine = torch.cat([got[row * cell.new : (row + 1) * cell.new] for row in rows])
    error = float((mine.double() - want).norm() / want.norm())
    if not error < TOLERANCE:
        raise Corrupt(f"differs from plain attention by {error:.3g}")


def measure(cell: LatentCell, read: float, product: float) -> dict[str, Any]:
    """Return the row of one cell; raises `Corrupt` when the kernel is wrong.

    `read` and `product` are this GPU's limits, GB/s and TFLOP/s.
    """
    from kvkernels.bench.timing import REPLAYS, microseconds

    batch = make(cell, "cuda")
    plan = plan_of(batch)
    check(cell, batch, attend(batch, plan, 1), 1)
    taken = microseconds(lambda number: attend(batch, plan, number % cell.layers), launches=32)
    by_products = cell.heads >= _BY_PRODUCTS
    limit = product if by_products else read
    done = cell.products / 1e3 if by_products else cell.read_bytes
    peer = None if cell.peer_us is None else cell.peer_us * PEER_LIMIT_GB_S / read
    return {
        "bench": "kernels",
        "case": cell.name,
        "value": round(done / taken / 1e3, 1),
        "unit": "TFLOP/s" if by_products else "GB/s",
        "limit": round(limit, 1),
        "limit_name": f"{'matrix product' if by_products else 'read limit'} of this run",
        "ratio_to_limit": round(done / taken / 1e3 / limit, 3),
        "peer": None if peer is None else round(done / peer / 1e3, 1),
        "peer_name": None if peer is None else "FlashMLA, recorded, scaled",
        "ratio_to_peer": None if peer is None else round(peer / taken, 3),
        "runs": REPLAYS,
        "microseconds": round(taken, 1),
        "device": torch.cuda.get_device_name(),
    }
