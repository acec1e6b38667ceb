"""Decode steps as captured CUDA graphs: one launch instead of a thousand.

A graph is captured for a padded batch and for the longest context it may see, so short contexts
do not pay for the work list of long ones. Rows beyond the batch write to the pool's last page, which
no sequence ever gets, and attend to nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from kvkernels.triton.replayed import ReplayedDecode
from torch import Tensor

from kvstore.core.limits import BLOCK_TOKENS
from kvworkers.models.step import StepInputs

BATCHES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXT_PAGES: Final = (256, 2_048, 8_192)
"""Pages of the longest sequence: 4k, 32k and 128k tokens."""

Compute = Callable[[StepInputs, Tensor, ReplayedDecode], Tensor]
"""Logits fp32 [rows, vocab] of every row of a step whose plan is given."""


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    step: StepInputs
    plan: ReplayedDecode
    logits: Tensor


class DecodeGraphs:
    """The graphs of one model over one pool; captured when first needed. For one thread."""

    def __init__(self, compute: Compute, pages: Tensor) -> None:
        """`pages` as `page_view` gives them; the last one is scratch."""
        self._compute = compute
        self._pages = pages
        self._scratch = (pages.shape[0] - 1) * BLOCK_TOKENS
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._memory: tuple[int, int] | None = None

    def fits(self, step: StepInputs, pages: Tensor) -> bool:
        """Say whether `step` is one token for each of not too many sequences of this pool."""
        rows = step.context_lengths.shape[0]
        return (
            pages.data_ptr() == self._pages.data_ptr()
            and step.tokens.shape[0] == rows == step.sample_rows.shape[0]
            and rows <= BATCHES[-1]
            and step.block_tables.shape[1] <= CONTEXT_PAGES[-1]
        )

    def prepare(self, batches: int, *, max_pages: int) -> None:
        """Capture every padded size up to `batches` sequences, for contexts of `max_pages`."""
        for size in BATCHES:
            self._of(size, max_pages)
            if size >= batches:
                return

    def forward(self, step: StepInputs) -> Tensor:
        """Replay; returns logits fp32 [rows, vocab], valid until the next call.

        `step` lies on the host; row i of the result is sequence i.
        """
        rows, width = step.block_tables.shape
        captured = self._of(rows, width)
        into, plan = captured.step, captured.plan
        padded = into.tokens.shape[0]
        numbers = torch.zeros(4, padded, dtype=torch.int64).pin_memory()
        numbers[0, :rows] = step.tokens
        numbers[1, :rows] = step.positions
        numbers[2] = self._scratch
        numbers[2, :rows] = step.slots
        numbers[3, :rows] = step.context_lengths
        there = numbers.to(self._pages.device, non_blocking=True)
        into.tokens.copy_(there[0])
        into.positions.copy_(there[1])
        into.slots.copy_(there[2])
        plan.contexts.copy_(there[3])
        tables = step.block_tables.pin_memory().to(self._pages.device, non_blocking=True)
        plan.tables[:rows, :width].copy_(tables)
        captured.graph.replay()
        return captured.logits[:rows]

    def _of(self, rows: int, width: int) -> _Captured:
        size = next(batch for batch in BATCHES if batch >= rows)
        longest = next(pages for pages in CONTEXT_PAGES if pages >= width)
        found = self._captured.get((size, longest))
        if found is None:
            found = self._captured[size, longest] = self._capture(size, longest)
        return found

    def _capture(self, rows: int, longest: int) -> _Captured:
        device = self._pages.device
        plan = ReplayedDecode(rows, longest, device)
        each = torch.arange(rows, device=device)
        step = StepInputs(
            tokens=torch.zeros(rows, dtype=torch.int64, device=device),
            positions=torch.zeros(rows, dtype=torch.int64, device=device),
            slots=torch.full((rows,), self._scratch, dtype=torch.int64, device=device),
            block_tables=plan.tables,
            context_lengths=plan.contexts,
            query_starts=torch.arange(rows + 1, dtype=torch.int32, device=device),
            sample_rows=each,
        )
        plan.tables.fill_(self._pages.shape[0] - 1)
        # Twice outside: kernels are compiled and the plan's work list is made by the first call.
        for _ in range(2):
            self._compute(step, self._pages, plan)
            plan.cut()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # Other threads copy blocks meanwhile; their calls are no part of this.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            plan.cut()
            logits = self._compute(step, self._pages, plan)
        self._memory = graph.pool()
        return _Captured(graph, step, plan, logits)
