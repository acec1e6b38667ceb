"""Ranges of every shape tile their block: no byte twice, none forgotten."""

from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.layout import CELL_ALIGNMENT, FORMATS, BlockLayout, Codec
from kvstore.core.limits import BLOCK_TOKENS, GRANULE_BYTES

LAYOUTS = st.builds(
    BlockLayout,
    layers=st.integers(1, 9),
    kv_heads=st.integers(1, 8),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    codec=st.sampled_from(Codec),
)


@given(LAYOUTS)
def test_sizes_nest(layout: BlockLayout) -> None:
    row = FORMATS[layout.codec]
    needed = 2 * BLOCK_TOKENS * layout.head_dim * row.bits // 8 + row.scale_bytes
    assert needed <= layout.cell_bytes < needed + CELL_ALIGNMENT
    assert layout.cell_bytes % CELL_ALIGNMENT == 0
    assert layout.payload_bytes == layout.kv_heads * layout.layers * layout.cell_bytes
    assert 0 <= layout.block_bytes - layout.payload_bytes < GRANULE_BYTES
    assert layout.block_bytes % GRANULE_BYTES == 0


@given(LAYOUTS, st.data())
def test_ranks_and_layer_slices_tile_the_payload(layout: BlockLayout, data: st.DataObject) -> None:
    ranks = data.draw(st.sampled_from([n for n in (1, 2, 4, 8) if layout.kv_heads % n == 0]))
    per_rank = layout.kv_heads // ranks
    slice_layers = data.draw(st.integers(1, layout.layers))
    at = 0
    for rank in range(ranks):
        part = layout.heads(rank * per_rank, per_rank)
        assert part.start == at
        for head in range(rank * per_rank, (rank + 1) * per_rank):
            for first in range(0, layout.layers, slice_layers):
                run = layout.layer_run(head, first, min(slice_layers, layout.layers - first))
                assert run.start == at
                at = run.stop
        assert part.stop == at
    assert at == layout.payload_bytes
