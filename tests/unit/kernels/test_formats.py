"""One block's bytes and back."""

import pytest
import torch
from kvkernels.formats import decode_block, encode_block
from kvkernels.ops import page_view

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import BlockLayout, Codec

RAW = [(Codec.RAW32, torch.float32), (Codec.RAW16, torch.bfloat16), (Codec.RAW16, torch.float16)]


@pytest.mark.parametrize(("codec", "dtype"), RAW)
def test_raw_blocks_come_back_bit_for_bit(codec: Codec, dtype: torch.dtype) -> None:
    layout = BlockLayout(layers=3, kv_heads=2, head_dim=24, codec=codec)
    key, value = (torch.randn(3, 2, 16, 24).to(dtype) for _ in range(2))
    block = encode_block(key, value, layout)
    assert block.shape == (layout.block_bytes,) and block.dtype == torch.uint8
    assert not block[layout.payload_bytes :].any()
    again = decode_block(block, layout, dtype)
    assert torch.equal(again[0], key) and torch.equal(again[1], value)
    assert torch.equal(encode_block(*again, layout), block)


def test_a_block_is_what_the_page_view_shows() -> None:
    layout = BlockLayout(layers=2, kv_heads=3, head_dim=8, codec=Codec.RAW32)
    key, value = torch.randn(2, 3, 16, 8), torch.randn(2, 3, 16, 8)
    page = page_view(encode_block(key, value, layout)[None], layout)[0]
    assert torch.equal(page[2, 1, 0], key[1, 2]) and torch.equal(page[2, 1, 1], value[1, 2])


@pytest.mark.parametrize("codec", [Codec.FP8, Codec.INT8, Codec.INT4])
def test_rows_without_an_encoder_say_so(codec: Codec) -> None:
    layout = BlockLayout(layers=1, kv_heads=1, head_dim=64, codec=codec)
    cells = torch.zeros(1, 1, 16, 64)
    with pytest.raises(Unsupported, match=codec.name):
        encode_block(cells, cells, layout)
    with pytest.raises(Unsupported, match=codec.name):
        decode_block(torch.zeros(layout.block_bytes, dtype=torch.uint8), layout)


def test_other_shapes_and_types_are_refused() -> None:
    layout = BlockLayout(layers=1, kv_heads=1, head_dim=8, codec=Codec.RAW32)
    good = torch.zeros(1, 1, 16, 8)
    with pytest.raises(BadInput, match="value"):
        encode_block(good, torch.zeros(1, 1, 15, 8), layout)
    with pytest.raises(BadInput, match="key"):
        encode_block(torch.zeros(2, 1, 16, 8), good, layout)
    with pytest.raises(BadInput, match="RAW32"):
        encode_block(good.half(), good.half(), layout)
