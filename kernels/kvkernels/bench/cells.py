"""What is measured: batches of one shape over scattered pages, and what they must come out as."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvkernels import ops
from kvkernels.plans import AttentionPlan, Rules
from kvkernels.quantised import QuantisedPages, decode_rows, encode_rows
from kvstore.core.layout import BlockLayout, Codec
from kvstore.core.limits import BLOCK_TOKENS

LAYERS: Final = 4
"""Layers of a page: launches go through them in turn, so that nothing is read from the L2 twice."""


_CAUSAL: Final = Rules()
_CHECKED_TOKENS: Final = 256
"""New tokens whose scores are written out at once: in float64 they are large."""


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
    codec: Codec = Codec.RAW16
    shared: int = 0
    """Tokens at the start of all sequences that lie in the same pages."""
    peer_us: float | None = None
    """The best peer on an H100 whose measured read limit was 3,126 GB/s."""
    peer: str = ""

    @property
    def read_bytes(self) -> int:
        """Bytes of cells that one launch has to read; shared ones count once."""
        seen = self.context if self.rules.window is None else min(
            self.context, self.rules.window + self.rules.sinks
        )  # fmt: skip
        tokens = self.batch * (seen - self.shared) + self.shared
        return tokens * self.heads * self.layout.cell_bytes // BLOCK_TOKENS

    @property
    def products(self) -> int:
        """Return floating-point operations of one launch: what new tokens see, no more."""
        pairs = self.batch * (self.new * self.context - self.new * (self.new - 1) // 2)
        return 4 * self.dim * self.heads * self.group * pairs

    @property
    def layout(self) -> BlockLayout:
        """The layout of the cell's pages."""
        return BlockLayout(layers=LAYERS, kv_heads=self.heads, head_dim=self.dim, codec=self.codec)


def _append_us(new: int, cached: int, tflops: int) -> float:
    """Return the microseconds of a peer whose rate was recorded."""
    return Cell("", 1, new + cached, new=new).products / tflops / 1e6


GATE: Final = (
    Cell("decode b1 c1024", 1, 1_024, peer_us=8.1, peer="FlashInfer fa2"),
    Cell("decode b1 c8192", 1, 8_192, peer_us=18.8, peer="cuDNN paged"),
    Cell("decode b1 c32768", 1, 32_768, peer_us=54.6, peer="FlashAttention-3"),
    Cell("decode b8 c8192", 8, 8_192, peer_us=97.4, peer="FlashAttention-3"),
    Cell("decode b64 c1024", 64, 1_024, peer_us=96.4, peer="cuDNN paged"),
    Cell("decode b64 c8192", 64, 8_192, peer_us=708.0, peer="FlashAttention-3"),
    Cell("decode b256 c1024", 256, 1_024, peer_us=363.0, peer="cuDNN paged"),
    Cell("decode b16 c8192", 16, 8_192),
    Cell("decode b64 c32768", 64, 32_768, peer_us=2_798.0, peer="FlashAttention-3"),
    Cell("decode b256 c8192", 256, 8_192, peer_us=2_803.0, peer="FlashAttention-3"),
    Cell("decode b8 c32768", 8, 32_768, peer_us=362.0, peer="FlashAttention-3"),
    Cell("decode group 3 d64 b64 c4096", 64, 4_096, heads=3, group=3, dim=64),
    Cell("decode MHA d128 b16 c4096", 16, 4_096, heads=32, group=1),
    Cell("decode MQA d128 b64 c8192", 64, 8_192, heads=1, group=8),
    Cell("decode d256 b32 c4096", 32, 4_096, heads=4, group=4, dim=256),
    Cell("decode window 4096 b64 c32768", 64, 32_768, rules=Rules(window=4_096, sinks=4)),
    *(
        Cell(
            f"decode b{batch} shared {shared} own {own}",
            batch,
            shared + own,
            shared=shared,
            peer_us=peer_us,
            peer="FlashAttention-3 plain",
        )
        for batch, shared, own, peer_us in (
            (16, 8_192, 512, 93.3),
            (64, 8_192, 512, 340.8),
            (256, 8_192, 512, 1_350.9),
            (64, 32_768, 512, 1_272.2),
        )
    ),
    *(
        Cell(
            f"append {new} over {cached}",
            1,
            new + cached,
            new=new,
            peer_us=None if tflops is None else _append_us(new, cached, tflops),
            peer="FlashAttention-3",
        )
        for new, cached, tflops in (
            (64, 8_192, None),
            (512, 8_192, 597),
            (2_048, 8_192, 626),
            (8_192, 8_192, 634),
            (256, 32_768, None),
            (512, 32_768, 597),
            (8_192, 0, 627),
        )
    ),
    Cell("decode fp8 b64 shared 8192 own 512", 64, 8_704, shared=8_192, codec=Codec.FP8),
    *(
        Cell(
            f"decode {codec.name.lower()} b{batch} c{context}",
            batch,
            context,
            codec=codec,
            peer_us=peer_us if codec == Codec.FP8 else None,
            peer=peer if codec == Codec.FP8 else "",
        )
        for codec in (Codec.FP8, Codec.INT8, Codec.INT4)
        for batch, context, peer_us, peer in (
            (1, 8_192, 14.0, "FlashInfer XQA"),
            (8, 8_192, 60.4, "FlashInfer XQA"),
            (64, 1_024, 54.3, "FlashInfer XQA"),
            (64, 8_192, 408.0, "FlashInfer XQA"),
            (256, 8_192, 1_464.0, "FlashInfer XQA"),
        )
    ),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one cell on the device."""

    query: Tensor
    pages: Tensor | QuantisedPages
    tables: Tensor
    contexts: Tensor
    starts: Tensor


def make(cell: Cell, device: str) -> Batch:
    """Return random pages in random order on `device`; block tables and lengths on the host."""
    pages_each = -(-cell.context // BLOCK_TOKENS)
    common = cell.shared // BLOCK_TOKENS
    total = common + (pages_each - common) * cell.batch
    pages = _random_pages(cell, total, device)
    order = torch.randperm(total).to(torch.int32)
    own = order[common:].reshape(cell.batch, pages_each - common)
    tables = torch.cat((order[:common].expand(cell.batch, -1), own), dim=1).contiguous()
    query = torch.randn(
        cell.batch * cell.new, cell.heads * cell.group, cell.dim,
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    return Batch(
        query,
        pages,
        tables,
        torch.full((cell.batch,), cell.context, dtype=torch.int32),
        torch.arange(cell.batch + 1, dtype=torch.int32) * cell.new,
    )


def _random_pages(cell: Cell, total: int, device: str) -> Tensor | QuantisedPages:
    """Return pages of normal K and V, bf16 or encoded by the oracle, made piece by piece."""
    shape = (total, cell.heads, LAYERS, 2, BLOCK_TOKENS, cell.dim)
    step = max(1, (1 << 26) // math.prod(shape[1:]))
    if cell.codec == Codec.RAW16:
        pages = torch.empty(shape, dtype=torch.bfloat16, device=device)
        for start in range(0, total, step):
            pages[start : start + step].normal_()
        return pages
    pool = torch.empty(total, cell.layout.block_bytes, dtype=torch.uint8, device=device)
    quantised = ops.quantised_view(pool, cell.layout)
    for start in range(0, total, step):
        count = min(step, total - start)
        rows = torch.randn(count, *shape[1:], device=device)
        for layer in range(LAYERS):
            codes, words = encode_rows(rows[:, :, layer], cell.codec)
            quantised.codes(layer)[start : start + count] = codes
            quantised.words(layer)[start : start + count] = words
    return quantised


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
    """Return attention of some sequences in float64, by the textbook, of what the pages hold."""
    scale = 1 / math.sqrt(cell.dim)
    out: list[Tensor] = []
    for row in sequences:
        chosen = _elements(batch.pages, layer, batch.tables[row].long())
        key, value = (
            chosen[:, :, at].permute(1, 0, 2, 3).reshape(cell.heads, -1, cell.dim)
            for at in (0, 1)
        )  # fmt: skip
        for start in range(0, cell.new, _CHECKED_TOKENS):
            tokens = range(start, min(start + _CHECKED_TOKENS, cell.new))
            query = batch.query[row * cell.new + start : row * cell.new + tokens.stop].double()
            query = query.reshape(len(tokens), cell.heads, cell.group, cell.dim)
            scores = torch.einsum("thgd,hcd->hgtc", query, key[:, : cell.context]) * scale
            if cell.rules.softcap is not None:
                scores = cell.rules.softcap * torch.tanh(scores / cell.rules.softcap)
            hidden = ~_visible(cell, tokens, scores.device)
            weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
            answer = torch.einsum("hgtc,hcd->thgd", weights, value[:, : cell.context])
            out.append(answer.reshape(len(tokens), -1, cell.dim))
    return torch.cat(out)


def _elements(pages: Tensor | QuantisedPages, layer: int, table: Tensor) -> Tensor:
    """Return some pages' K and V of one layer: float64 [n, kv_heads, 2, 16, head_dim]."""
    if not isinstance(pages, QuantisedPages):
        return pages[table][:, :, layer].double()
    codes, words = pages.codes(layer)[table], pages.words(layer)[table]
    return decode_rows(codes, words, pages.codec).double()


def _visible(cell: Cell, tokens: range, device: torch.device) -> Tensor:
    """Return which tokens each of some new ones sees: bool [tokens, context]."""
    first = cell.context - cell.new
    seen = torch.arange(first + tokens.start, first + tokens.stop, device=device)[:, None]
    spot = torch.arange(cell.context, device=device)[None]
    visible = spot <= seen
    if cell.rules.window is not None:
        visible &= (spot > seen - cell.rules.window) | (spot < cell.rules.sinks)
    return visible
