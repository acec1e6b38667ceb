"""In which form blocks lie in the arena and in the pages, and which way leads between them."""

from dataclasses import dataclass, replace
from typing import Final

import torch

from kvstore.core.layout import BlockLayout, Codec
from kvstore.core.names import Fidelity

_STORED: Final[dict[Fidelity, Codec]] = {
    Fidelity.FP8: Codec.FP8,
    Fidelity.INT8: Codec.INT8,
    Fidelity.INT4: Codec.INT4,
}


def stored_layout(pages: BlockLayout, fidelity: Fidelity) -> BlockLayout:
    """Return the layout of blocks in a store of `fidelity`: the pages' own if it is exact."""
    codec = _STORED.get(fidelity)
    return pages if codec is None else replace(pages, codec=codec)


STORE_PROGRAMS: Final = 32
"""Programs of a kernel that encodes: it is bound by arithmetic."""


@dataclass(frozen=True, slots=True)
class Forms:
    """Layouts on both ends of a mover."""

    pages: BlockLayout
    stored: BlockLayout
    """The same shape; where its codec is another one, blocks are encoded and decoded on the way."""
    element: torch.dtype
    """What the pages' elements are."""

    @property
    def transcodes(self) -> bool:
        """Whether bytes change on the way."""
        return self.pages.codec is not self.stored.codec

    @property
    def load_programs(self) -> int:
        """Programs of a loading kernel that fill a PCIe 5 bus beside a step (docs/worker.md)."""
        return {Codec.FP8: 32, Codec.INT8: 32, Codec.INT4: 64}.get(self.stored.codec, 16)

    @property
    def beside_programs(self) -> int:
        """Programs that leave the device to the requests that compute meanwhile.

        *Measured* on an H100 beside 16 that decode: of a load's time 95 % were hidden with 4
        programs of raw blocks, 92 and 96 with 8 of fp8 and int4; with twice as many 88, 85 and 84.
        The copy engine hid 75 to 78: queueing thousands of copies keeps Python busy.
        """
        return 8 if self.transcodes else 4
