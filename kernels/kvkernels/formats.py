"""Encoders and decoders of one block, in torch: the readable form of `core.layout`'s table.

Raw codecs hold the elements as they are; the quantised ones are described in
`kvkernels.quantised`, with the error that each may make.
"""

import torch
from torch import Tensor

from kvkernels.ops import page_view, quantised_view
from kvkernels.quantised import LARGEST_CODE, decode_rows, encode_rows
from kvstore.core.errors import BadInput
from kvstore.core.layout import BlockLayout
from kvstore.core.limits import BLOCK_TOKENS


def encode_block(key: Tensor, value: Tensor, layout: BlockLayout) -> Tensor:
    """Return the bytes of one block: uint8 [block_bytes], padding zero.

    key, value [layers, kv_heads, 16, head_dim]: of a type that a raw codec holds, of any
    floating type for a quantised one. Raises `BadInput` for other shapes and types.
    """
    expected = (layout.layers, layout.kv_heads, BLOCK_TOKENS, layout.head_dim)
    block = torch.zeros((1, layout.block_bytes), dtype=torch.uint8)
    for name, tensor in (("key", key), ("value", value)):
        if tuple(tensor.shape) != expected or not tensor.is_floating_point():
            raise BadInput(f"{name} must be floating {expected}, got {tuple(tensor.shape)}")
    if layout.codec in LARGEST_CODE:
        pages = quantised_view(block, layout)
        for layer in range(layout.layers):
            rows = torch.stack((key[layer], value[layer]), dim=1)
            codes, words = encode_rows(rows, layout.codec)
            pages.codes(layer)[0] = codes
            pages.words(layer)[0] = words
        return block[0]
    view = page_view(block, layout, key.dtype)[0]
    if value.dtype != key.dtype:
        raise BadInput(f"value is {value.dtype}, key {key.dtype}")
    view[:, :, 0], view[:, :, 1] = key.transpose(0, 1), value.transpose(0, 1)
    return block[0]


def decode_block(
    block: Tensor, layout: BlockLayout, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return key and value, [layers, kv_heads, 16, head_dim] each, of one block's bytes.

    The inverse of `encode_block`: views, bit for bit, for raw codecs; for quantised ones new
    tensors of `dtype` (float32 by default), within the codec's error.
    """
    if layout.codec in LARGEST_CODE:
        pages = quantised_view(block.reshape(1, -1), layout)
        rows = torch.stack(
            [
                decode_rows(pages.codes(layer)[0], pages.words(layer)[0], layout.codec)
                for layer in range(layout.layers)
            ]
        ).to(dtype or torch.float32)
        return rows[:, :, 0], rows[:, :, 1]
    view = page_view(block.reshape(1, -1), layout, dtype)[0].transpose(0, 1)
    return view[:, :, 0], view[:, :, 1]
