"""Quantised rows in torch, and pages of them: the readable form of three rows of `core.layout`.

A *row* is one token's K (or V) of one head and layer. It becomes `head_dim * bits / 8` bytes of
codes and one 32-bit scale word, so the cells of all three codecs are walked alike:

    cell = K codes [16, row] | V codes [16, row] | words [2 (K, V), 16]

    codec   code                                   word                     |x - decoded| at most
    FP8     e4m3fn of x / s, s = max|x| / 448      float32 s                max(|x| / 16, s / 1024)
    INT8    round(x / s), s = max|x| / 127         float32 s                s / 2
    INT4    8 + round(x / s), s = max|x| / 7       float16 s of the first   s / 2
            per half row; byte j holds dim j       half (low 16 bits) and
            (low nibble) and dim j + D/2 (high)    of the second (high)

A float16 scale is rounded up, so that no code has to be clipped. Half rows whose maximum is above
7 * 65,504 saturate there. A row that holds NaN or Inf decodes to a row with NaN or Inf; no other
row is touched. Rounding is to nearest, ties to even: the Triton encoder gives the same bytes.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import FORMATS, BlockLayout, Codec
from kvstore.core.limits import BLOCK_TOKENS

LARGEST_CODE: Final = {Codec.FP8: 448.0, Codec.INT8: 127.0, Codec.INT4: 7.0}
"""What the largest magnitude of a row (half row for INT4) is mapped to."""

WORD_BYTES: Final = 4
_HALF_MAX: Final = 65_504.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedPages:
    """A pool seen as cells of one quantised codec; `ops.quantised_view` makes it."""

    cells: Tensor
    """uint8 [pages, kv_heads, layers, cell_bytes], a view."""
    codec: Codec
    head_dim: int

    @property
    def row_bytes(self) -> int:
        """Bytes of codes of one token's K or V."""
        return self.head_dim * FORMATS[self.codec].bits // 8

    def codes(self, layer: int) -> Tensor:
        """Return one layer's codes, a view: uint8 [pages, kv_heads, 2 (K, V), 16, row_bytes]."""
        size = 2 * BLOCK_TOKENS * self.row_bytes
        cells = self.cells.select(2, layer).narrow(2, 0, size)
        pages, heads = cells.shape[:2]
        return cells.view(pages, heads, 2, BLOCK_TOKENS, self.row_bytes)

    def words(self, layer: int) -> Tensor:
        """Return one layer's scale words, a view: int32 [pages, kv_heads, 2 (K, V), 16]."""
        start, size = 2 * BLOCK_TOKENS * self.row_bytes, 2 * BLOCK_TOKENS * WORD_BYTES
        words = self.cells.select(2, layer).narrow(2, start, size).view(torch.int32)
        return words.view(words.shape[0], words.shape[1], 2, BLOCK_TOKENS)


def view_cells(pool: Tensor, layout: BlockLayout) -> QuantisedPages:
    """See `kvkernels.ops.quantised_view`, which checks the pool."""
    if layout.codec not in LARGEST_CODE:
        raise BadInput(f"codec {layout.codec.name} is not quantised")
    cells = pool.as_strided(
        (pool.shape[0], layout.kv_heads, layout.layers, layout.cell_bytes),
        (pool.stride(0), layout.share_bytes, layout.cell_bytes, 1),
    )
    return QuantisedPages(cells=cells, codec=layout.codec, head_dim=layout.head_dim)


def encode_rows(rows: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 [..., row_bytes], and scale words, int32 [...], of rows [..., dim].

    Raises `Unsupported` for a codec that has no scales.
    """
    wide = rows.float()
    if codec == Codec.INT4:
        return _encode_nibbles(wide)
    if codec not in LARGEST_CODE:
        raise Unsupported(f"codec {codec.name} has no quantised rows")
    limit = LARGEST_CODE[codec]
    scale = _without_zero(wide.abs().amax(-1) / limit)
    scaled = (wide / scale[..., None]).clamp(-limit, limit)
    if codec == Codec.FP8:
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = scaled.round().to(torch.int8).view(torch.uint8)
    return codes, scale.view(torch.int32)


def _encode_nibbles(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Encode INT4: two scales a row, the halves' codes in the nibbles of one byte."""
    limit = LARGEST_CODE[Codec.INT4]
    halves = wide.reshape(*wide.shape[:-1], 2, -1)
    exact = halves.abs().amax(-1) / limit
    exact = torch.where(exact.isfinite(), exact.clamp(max=_HALF_MAX), exact)
    scale = exact.half()
    # The next float16 above is the next bit pattern.
    above = (scale.view(torch.int16) + 1).view(torch.float16)
    scale = _without_zero(torch.where(scale.float() < exact, above, scale))
    codes = (halves / scale.float()[..., None]).clamp(-limit, limit).round() + 8
    low, high = codes.to(torch.uint8).unbind(-2)
    return low | (high << 4), scale.contiguous().view(torch.int32)[..., 0]


def _without_zero(scale: Tensor) -> Tensor:
    """Give rows of zeros (and what is too small for a scale) the scale 1: their codes are 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def decode_rows(codes: Tensor, words: Tensor, codec: Codec) -> Tensor:
    """Return float32 rows [..., dim]: `encode_rows` backwards, up to the codec's error."""
    if codec == Codec.INT4:
        halves = torch.stack((codes & 15, codes >> 4), dim=-2).float() - 8
        scale = words.contiguous()[..., None].view(torch.float16).float()
        return (halves * scale[..., None]).flatten(-2)
    if codec not in LARGEST_CODE:
        raise Unsupported(f"codec {codec.name} has no quantised rows")
    kind = torch.float8_e4m3fn if codec == Codec.FP8 else torch.int8
    return codes.view(kind).float() * words.view(torch.float32)[..., None]
