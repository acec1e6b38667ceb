"""What the movement benchmark measures; the measuring itself needs a GPU (tests/gpu)."""

from kvkernels.bench.moving import GATE, RAW, Move

from kvstore.core.layout import Codec


def test_cases_are_told_apart_by_name() -> None:
    names = [cell.name for cell in GATE]
    assert len(set(names)) == len(names)
    assert "load int4 whole blocks 64 programs" in names


def test_the_arena_has_the_same_blocks_in_its_own_codec() -> None:
    raw, small = Move(Codec.RAW16, 8, 16).layout, Move(Codec.INT4, 8, 16).layout
    assert raw == RAW and raw.block_bytes == 2 << 20
    assert (small.layers, small.kv_heads, small.head_dim) == (32, 8, 128)
    assert small.payload_bytes * 3.7 < raw.payload_bytes
