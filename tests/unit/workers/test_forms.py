"""Which form blocks have in a store."""

import pytest
import torch
from kvworkers.stream.forms import Forms, stored_layout

from kvstore.core.errors import BadInput
from kvstore.core.layout import BlockLayout, Codec
from kvstore.core.names import Fidelity, check_fidelity

PAGES = BlockLayout(layers=32, kv_heads=8, head_dim=128, codec=Codec.RAW16)


MIB = {
    Fidelity.EXACT: 2.0,
    Fidelity.FP8: 1.03125,
    Fidelity.INT8: 1.03125,
    Fidelity.INT4: 0.53125,
}


@pytest.mark.parametrize(("fidelity", "mib"), MIB.items())
def test_a_store_keeps_blocks_as_its_fidelity_says(fidelity: Fidelity, mib: float) -> None:
    stored = stored_layout(PAGES, fidelity)
    assert stored.block_bytes == mib * (1 << 20)
    forms = Forms(PAGES, stored, torch.bfloat16)
    assert forms.transcodes == (fidelity is not Fidelity.EXACT)
    assert forms.beside_programs < forms.load_programs


def test_an_unknown_fidelity_is_refused_by_name() -> None:
    check_fidelity("--fidelity", "int4")
    with pytest.raises(BadInput, match="--fidelity 'fp4': one of exact, fp8, int8, int4"):
        check_fidelity("--fidelity", "fp4")
