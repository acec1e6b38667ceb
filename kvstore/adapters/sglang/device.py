"""One of SGLang's device pools, page by page: bytes out of it, and layer by layer into it.

A page is one run of bytes: for each of the pool's components, for each of its buffers, the rows of
that page. On a GPU the rows are gathered and scattered there, so that a batch of pages crosses
in one copy for each buffer; on a CPU the same code moves host memory.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from kvstore.adapters.opaque import Block, Piece
from kvstore.core.errors import Unsupported

Fetch = Callable[[int, int, int, int], None]
"""Copies of the n-th page of a load: `size` bytes from `offset` on, to an address."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows that a page has in one buffer."""

    rows: torch.Tensor
    """The buffer as bytes, [rows, …]."""
    span: int
    """Rows of a page."""
    offset: int
    size: int
    layer: int


class DevicePages:
    """The pages of one pool. `rows` are what `rows_of` returned: each page's first row."""

    def __init__(self, entry: Any) -> None:
        """`entry` is one of SGLang's `DevicePoolEntry`; raises `Unsupported` naming what is not."""
        self.name = str(getattr(entry.name, "value", entry.name))
        self.page = int(entry.page_size)
        self._entry = entry
        self._parts = _parts_of(entry)
        self.page_bytes = sum(part.size for part in self._parts)
        self.dtype = str(entry.components[0][0].dtype)
        self._device = self._parts[0].rows.device
        if self._device.type not in ("cpu", "cuda"):
            raise Unsupported(f"pool {self.name} is on {self._device}: cpu and cuda are served")
        self.on_gpu = self._device.type == "cuda"
        self._stream = (
            torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            if self.on_gpu
            else None
        )

    @property
    def form(self) -> str:
        """Which bytes make a page, for its namespace."""
        return "+".join(f"{part.layer}:{part.size}" for part in self._parts)

    def rows_of(self, indices: Any) -> list[int]:
        """Return the pages' first rows; raises `ValueError` where indices are no whole pages."""
        found: list[int] = self._entry.prepare_locations(indices)
        return found

    def scatter(self, layer: int, rows: Sequence[int], fetch: Fetch) -> None:
        """Bring one layer of pages into the pool; it is there when this returns."""
        parts = [part for part in self._parts if part.layer == layer]
        if not parts or not rows:
            return
        with self._on_stream():
            for part in parts:
                staged = self._staging(len(rows), part.size)
                base = staged.data_ptr()
                for at in range(len(rows)):
                    fetch(at, part.offset, part.size, base + at * part.size)
                filled = staged.view(len(rows) * part.span, *part.rows.shape[1:])
                part.rows.index_copy_(
                    0, self._index(rows, part.span), filled.to(self._device, non_blocking=True)
                )
                # The staging memory goes back to its pool: the copy out of it has to be over.
                self._synchronize()

    def gather(self, rows: Sequence[int]) -> tuple[torch.Tensor, list[Block]]:
        """Copy pages out; the blocks lie in the tensor, which has to be kept for them."""
        with self._on_stream():
            pages = torch.empty(
                (len(rows), self.page_bytes), dtype=torch.uint8, device=self._device
            )
            for part in self._parts:
                taken = part.rows.index_select(0, self._index(rows, part.span))
                pages[:, part.offset : part.offset + part.size] = taken.view(len(rows), -1)
            staged = pages
            if self._stream is not None:
                staged = self._staging(len(rows), self.page_bytes)
                staged.copy_(pages, non_blocking=True)
            self._synchronize()
        base = staged.data_ptr()
        blocks: list[Block] = [
            [Piece(base + at * self.page_bytes, self.page_bytes)] for at in range(len(rows))
        ]
        return staged, blocks

    def _index(self, rows: Sequence[int], span: int) -> torch.Tensor:
        first = torch.tensor(rows, dtype=torch.int64)
        index = (first[:, None] + torch.arange(span)).flatten()
        return index.to(self._device, non_blocking=True)

    def _staging(self, pages: int, size: int) -> torch.Tensor:
        return torch.empty((pages, size), dtype=torch.uint8, pin_memory=self.on_gpu)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def _parts_of(entry: Any) -> list[_Part]:
    layer_of: dict[int, int] = {}
    for layer, buffers in entry.layer_mapping.items():
        for buffer in [buffers] if isinstance(buffers, int) else buffers:
            layer_of[buffer] = layer
    parts, offset = [], 0
    for buffers, metas in zip(entry.components, entry.buffer_meta, strict=True):
        for at, (buffer, (_, _, size)) in enumerate(zip(buffers, metas, strict=True)):
            if buffer.dim() < 2 or buffer.stride(-1) != 1:
                raise Unsupported(f"pool {entry.name}: a buffer of shape {tuple(buffer.shape)}")
            if at not in layer_of:
                raise Unsupported(f"pool {entry.name}: buffer {at} belongs to no layer")
            span = size // (buffer.nbytes // buffer.shape[0])
            parts.append(_Part(buffer.view(torch.uint8), span, offset, size, layer_of[at]))
            offset += size
    return parts
