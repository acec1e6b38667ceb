"""One block's bytes and back."""

import pytest
import torch
from kvkernels.formats import decode_block, encode_block
from kvkernels.ops import page_view, quantised_view, write_pages
from kvkernels.quantised import decode_rows, encode_rows

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


QUANTISED = [Codec.FP8, Codec.INT8, Codec.INT4]


def bound(rows: torch.Tensor, codec: Codec) -> torch.Tensor:
    """What `kvkernels.quantised` promises: the largest error of each element."""
    top = rows.abs().amax(-1, keepdim=True)
    if codec == Codec.FP8:
        return torch.maximum(rows.abs() / 16, top / 448 / 1024)
    if codec == Codec.INT8:
        return (top / 127 / 2).expand_as(rows)
    halves = rows.reshape(*rows.shape[:-1], 2, -1).abs().amax(-1, keepdim=True) / 7
    # The scale is the next float16 above at most: 2^-10 more, or one step below the normal ones.
    scale = torch.maximum(halves * (1 + 2**-10), halves + 2**-24)
    return (scale / 2).expand(*rows.shape[:-1], 2, rows.shape[-1] // 2).flatten(-2)


@pytest.mark.parametrize("codec", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_quantised_rows_stay_within_their_bound(
    codec: Codec, dtype: torch.dtype, size: float
) -> None:
    rows = (torch.randn(500, 64) * torch.logspace(-2, 1, 500)[:, None] * size).to(dtype)
    rows[7] = 0
    again = decode_rows(*encode_rows(rows, codec), codec)
    wide = rows.float()
    assert ((again - wide).abs() <= bound(wide, codec) * (1 + 1e-5) + 1e-12).all()
    assert not again[7].any()
    # Rows that were decoded once lose nothing more, but for scales near float16's smallest.
    assert size < 1 or torch.allclose(
        decode_rows(*encode_rows(again, codec), codec), again, rtol=2e-3
    )


@pytest.mark.parametrize("codec", QUANTISED)
def test_what_is_not_finite_stays_in_its_row(codec: Codec) -> None:
    rows = torch.randn(3, 32)
    clean = decode_rows(*encode_rows(rows, codec), codec)
    rows[1, 5], rows[1, 20] = float("nan"), float("inf")
    again = decode_rows(*encode_rows(rows, codec), codec)
    assert not again[1].isfinite().all()
    assert torch.equal(again[[0, 2]], clean[[0, 2]])
    huge = decode_rows(*encode_rows(torch.full((1, 32), 3e38), codec), codec)
    assert huge.isfinite().all() and (huge > 0).all()


@pytest.mark.parametrize("codec", QUANTISED)
def test_quantised_blocks_have_the_bytes_of_the_table(codec: Codec) -> None:
    layout = BlockLayout(layers=3, kv_heads=2, head_dim=32, codec=codec)
    key, value = torch.randn(3, 2, 16, 32), torch.randn(3, 2, 16, 32) * 5
    block = encode_block(key, value, layout)
    assert block.shape == (layout.block_bytes,) and not block[layout.payload_bytes :].any()
    for got, given in zip(decode_block(block, layout), (key, value), strict=True):
        assert ((got - given).abs() <= bound(given, codec) * (1 + 1e-5)).all()
    assert decode_block(block, layout, torch.bfloat16)[0].dtype == torch.bfloat16
    # The value row of token 9 in layer 2 of head 1, found by the table's arithmetic.
    cell = block[layout.layer_run(1, 2, 1).start :][: layout.cell_bytes]
    row = layout.codes_bytes // 16
    codes = cell[layout.codes_bytes + 9 * row :][:row]
    scales = cell[2 * layout.codes_bytes :][16 * 4 + 9 * 4 :][:4]
    wanted = decode_block(block, layout)[1][2, 1, 9]
    if codec == Codec.INT4:
        low, high = scales.view(torch.float16).float()
        mine = torch.cat((((codes & 15).float() - 8) * low, ((codes >> 4).float() - 8) * high))
    else:
        kind = torch.float8_e4m3fn if codec == Codec.FP8 else torch.int8
        mine = codes.view(kind).float() * scales.view(torch.float32)
    assert torch.equal(mine, wanted)


@pytest.mark.parametrize("codec", QUANTISED)
def test_written_rows_are_those_of_the_block(codec: Codec) -> None:
    layout = BlockLayout(layers=2, kv_heads=3, head_dim=16, codec=codec)
    key, value = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    pool = torch.zeros(4, layout.block_bytes, dtype=torch.uint8)
    order = torch.randperm(16)
    for layer in (0, 1):
        keys, values = (tensor[layer].transpose(0, 1)[order] for tensor in (key, value))
        write_pages(keys, values, quantised_view(pool, layout), 32 + order, layer)
    assert torch.equal(pool[2], encode_block(key, value, layout))
    assert not pool[[0, 1, 3]].any()


def test_raw_codecs_have_no_quantised_rows() -> None:
    rows = torch.zeros(1, 16)
    layout = BlockLayout(layers=1, kv_heads=1, head_dim=16, codec=Codec.RAW16)
    with pytest.raises(Unsupported, match="RAW16"):
        encode_rows(rows, Codec.RAW16)
    with pytest.raises(Unsupported, match="RAW32"):
        decode_rows(rows.byte(), rows[:, 0].int(), Codec.RAW32)
    with pytest.raises(BadInput, match="RAW16"):
        quantised_view(torch.zeros(1, layout.block_bytes, dtype=torch.uint8), layout)


def test_other_shapes_and_types_are_refused() -> None:
    layout = BlockLayout(layers=1, kv_heads=1, head_dim=8, codec=Codec.RAW32)
    good = torch.zeros(1, 1, 16, 8)
    with pytest.raises(BadInput, match="value"):
        encode_block(good, torch.zeros(1, 1, 15, 8), layout)
    with pytest.raises(BadInput, match="key"):
        encode_block(torch.zeros(2, 1, 16, 8), good, layout)
    with pytest.raises(BadInput, match="RAW32"):
        encode_block(good.half(), good.half(), layout)
