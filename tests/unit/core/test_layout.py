"""The table of formats, byte for byte, and the formulas that follow from it."""

import re
from pathlib import Path
from typing import Any

import pytest

from kvstore.core.errors import BadInput, TooLarge
from kvstore.core.layout import (
    FORMATS,
    RAW_CODEC,
    BlockLayout,
    ByteRange,
    Codec,
    kv_bytes_per_token,
    round_up,
)
from kvstore.core.limits import BLOCK_TOKENS, MAX_SHARES

_PAGE = Path(__file__).resolve().parents[3] / "docs" / "formats.md"

CELLS = {
    (128, Codec.RAW16): 8192, (128, Codec.RAW32): 16384,
    (128, Codec.FP8): 4224, (128, Codec.INT8): 4224, (128, Codec.INT4): 2176,
    (64, Codec.RAW16): 4096, (64, Codec.RAW32): 8192,
    (64, Codec.FP8): 2176, (64, Codec.INT8): 2176, (64, Codec.INT4): 1152,
}  # fmt: skip


def _layout(codec: Codec = Codec.RAW16, **changes: Any) -> BlockLayout:
    fields: dict[str, Any] = {"layers": 32, "kv_heads": 8, "head_dim": 128}
    return BlockLayout(codec=codec, **(fields | changes))


@pytest.mark.parametrize(("key", "cell_bytes"), CELLS.items())
def test_cells_have_the_designed_sizes(key: tuple[int, Codec], cell_bytes: int) -> None:
    head_dim, codec = key
    assert _layout(codec, head_dim=head_dim).cell_bytes == cell_bytes


def test_the_page_shows_the_same_table() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|",
        _PAGE.read_text(encoding="utf-8"),
        flags=re.M,
    )
    shown = {
        name: (int(code), int(bits), int(scales), int(at64), int(at128))
        for name, code, bits, scales, at64, at128 in rows
    }
    assert shown == {
        codec.name: (
            codec.value,
            FORMATS[codec].bits,
            FORMATS[codec].scale_bytes,
            _layout(codec, head_dim=64).cell_bytes,
            _layout(codec, head_dim=128).cell_bytes,
        )
        for codec in Codec
    }


def test_codecs_fit_four_bits_and_have_a_row() -> None:
    assert set(FORMATS) == set(Codec)
    assert all(0 <= codec < 16 and FORMATS[codec].codec is codec for codec in Codec)
    assert set(RAW_CODEC) == {"float32", "bfloat16", "float16"}
    assert {FORMATS[codec].scale_bytes for codec in RAW_CODEC.values()} == {0}


def test_llama_3_8b_blocks_are_two_mebibytes() -> None:
    layout = _layout()
    assert layout.block_bytes == layout.payload_bytes == 2 << 20
    assert layout.bytes_per_token == 131_072


@pytest.mark.parametrize(
    ("layers", "kv_heads", "head_dim", "element_bytes", "expected"),
    [
        (80, 8, 128, 2, 327_680),  # Llama-3-70B, GQA
        (32, 32, 128, 2, 524_288),  # Llama-2-7B, MHA
        (32, 1, 128, 2, 16_384),  # the same shape with MQA
        (30, 3, 64, 4, 46_080),  # SmolLM2-135M in float32
    ],
)
def test_formulas_for_mha_gqa_and_mqa(
    layers: int, kv_heads: int, head_dim: int, element_bytes: int, expected: int
) -> None:
    per_token = kv_bytes_per_token(
        layers=layers, kv_heads=kv_heads, head_dim=head_dim, element_bytes=element_bytes
    )
    assert per_token == expected
    codec = Codec.RAW32 if element_bytes == 4 else Codec.RAW16
    layout = BlockLayout(layers=layers, kv_heads=kv_heads, head_dim=head_dim, codec=codec)
    assert layout.payload_bytes == per_token * BLOCK_TOKENS


def test_a_rank_takes_one_range() -> None:
    layout = _layout()
    assert layout.heads(2, 4) == ByteRange(2 * layout.share_bytes, 6 * layout.share_bytes)
    assert layout.layer_run(1, 8, 8) == ByteRange(
        layout.share_bytes + 8 * layout.cell_bytes, layout.share_bytes + 16 * layout.cell_bytes
    )


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 0), (0, 9), (8, 1), (7, 2), (0, -1)])
def test_heads_outside_the_block(first: int, count: int) -> None:
    with pytest.raises(BadInput, match="heads"):
        _layout().heads(first, count)


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 0), (0, 33), (32, 1)])
def test_layers_outside_the_block(first: int, count: int) -> None:
    with pytest.raises(BadInput, match="layers"):
        _layout().layer_run(0, first, count)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers": 0}, BadInput, "layers"),
        ({"kv_heads": -1}, BadInput, "kv_heads"),
        ({"head_dim": 0}, BadInput, "head_dim"),
        ({"head_dim": 12}, BadInput, "multiple of 8"),
        ({"kv_heads": MAX_SHARES + 1}, TooLarge, "1025 KV heads"),
        ({"layers": 4096}, TooLarge, "allowed"),
    ],
)
def test_bad_shapes(change: dict[str, Any], error: type[BadInput], message: str) -> None:
    with pytest.raises(error, match=message):
        _layout(**change)


def test_round_up() -> None:
    assert [round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]
