"""Encoders and decoders of one block, in torch: the readable form of `core.layout`'s table.

Raw codecs hold the elements as they are. The quantised rows are reserved in the table and
raise `Unsupported` here until their encoders exist, so a lossy page can never be made by accident.
"""

import torch
from torch import Tensor

from kvkernels.ops import page_view
from kvstore.core.errors import BadInput
from kvstore.core.layout import BlockLayout
from kvstore.core.limits import BLOCK_TOKENS


def encode_block(key: Tensor, value: Tensor, layout: BlockLayout) -> Tensor:
    """Return the bytes of one block: uint8 [block_bytes], padding zero.

    key, value [layers, kv_heads, 16, head_dim] of a type that the codec holds. Raises
    `Unsupported` for codecs without an encoder, `BadInput` for other shapes.
    """
    expected = (layout.layers, layout.kv_heads, BLOCK_TOKENS, layout.head_dim)
    block = torch.zeros((1, layout.block_bytes), dtype=torch.uint8)
    view = page_view(block, layout, key.dtype)[0]
    for name, tensor, half in (("key", key, 0), ("value", value, 1)):
        if tuple(tensor.shape) != expected or tensor.dtype != view.dtype:
            raise BadInput(f"{name} must be {expected} of {view.dtype}, got {tuple(tensor.shape)}")
        view[:, :, half] = tensor.transpose(0, 1)
    return block[0]


def decode_block(
    block: Tensor, layout: BlockLayout, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return key and value, [layers, kv_heads, 16, head_dim] each, of one block's bytes.

    The inverse of `encode_block`: bit for bit for raw codecs. Views, no copies.
    """
    view = page_view(block.reshape(1, -1), layout, dtype)[0].transpose(0, 1)
    return view[:, :, 0], view[:, :, 1]
