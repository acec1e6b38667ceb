"""Decode steps and short appends as captured CUDA graphs: one launch instead of a thousand.

A graph is captured for a padded size and for the longest context it may see, so short contexts
do not pay for the work list of long ones. Rows beyond the batch write to the pool's last page,
which no sequence ever gets, and attend to nothing.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NamedTuple

import torch
from kvkernels.triton.replayed import ReplayedAppend, ReplayedDecode
from torch import Tensor

from kvstore.core.limits import BLOCK_TOKENS
from kvworkers.models.step import StepInputs, on_device
from kvworkers.stream.gate import layer_groups

BATCHES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
APPENDS: Final = (16, 64, 128, 256, 512)
"""New tokens of one sequence; longer chunks keep the device busy without a graph."""
CONTEXT_PAGES: Final = (256, 1_024, 4_096, 8_192)
"""Pages of the longest sequence: 4k, 16k, 64k and 128k tokens."""

Plan = ReplayedDecode | ReplayedAppend
Compute = Callable[[StepInputs, Tensor, Plan], Iterator[Tensor]]
"""Computes a step whose plan is given, a group of layers at a time; logits come last."""


@dataclass(slots=True)
class _Captured:
    graphs: list[torch.cuda.CUDAGraph]
    """One; or one for each part of a step that may wait for loads between."""
    step: StepInputs
    plan: Plan
    logits: Tensor


class _Key(NamedTuple):
    """What a capture is good for."""

    decode: bool
    apart: bool
    """In parts, for an append that follows a load: each start of a graph costs the others time."""
    tokens: int
    pages: int
    """Of the longest sequence."""


class StepGraphs:
    """The graphs of one model over one pool; captured when first needed. For one thread."""

    def __init__(self, compute: Compute, pages: Tensor, *, layers: int) -> None:
        """`pages` as `page_view` gives them; the last one is scratch."""
        self._compute = compute
        self._groups = layer_groups(layers)
        self._pages = pages
        self._scratch = (pages.shape[0] - 1) * BLOCK_TOKENS
        self._captured: dict[_Key, _Captured] = {}
        self._memory: Any = None

    def fits(self, step: StepInputs, pages: Tensor) -> bool:
        """Say whether `step` over this pool is a decode step or one short append, small enough."""
        rows, tokens = step.context_lengths.shape[0], step.tokens.shape[0]
        return (
            pages.data_ptr() == self._pages.data_ptr()
            and rows == step.sample_rows.shape[0]
            and step.block_tables.shape[1] <= CONTEXT_PAGES[-1]
            and (tokens == rows <= BATCHES[-1] or (rows == 1 and tokens <= APPENDS[-1]))
        )

    def prepare(self, batches: int, *, max_pages: int) -> None:
        """Capture every padded size up to `batches` sequences, for contexts of `max_pages`."""
        for tokens in APPENDS:
            for apart in (False, True):
                self._of(tokens, max_pages, decode=False, apart=apart)
        for size in BATCHES:
            self._of(size, max_pages, decode=True, apart=False)
            if size >= batches:
                return

    def forward(self, step: StepInputs) -> Tensor:
        """Queue a replay; returns logits fp32 [rows, vocab], valid until the next call.

        `step` lies on the host; row i of the result is sequence i.
        """
        rows, width = step.block_tables.shape
        tokens = step.tokens.shape[0]
        decode = tokens == rows
        captured = self._of(tokens, width, decode=decode, apart=bool(step.gates) and not decode)
        into, plan = captured.step, captured.plan
        size, longest = into.tokens.shape[0], plan.contexts.shape[0]
        numbers = torch.empty(3, max(size, longest), dtype=torch.int64, pin_memory=True)
        numbers[0, :tokens], numbers[0, tokens:] = step.positions, 0
        numbers[1, :tokens], numbers[1, tokens:] = step.slots, self._scratch
        numbers[2] = 0
        if isinstance(plan, ReplayedDecode):
            numbers[2, :rows] = step.context_lengths
        else:
            numbers[2, 0], numbers[2, 1] = int(step.context_lengths[0]), tokens
            into.sample_rows.fill_(tokens - 1)
        device = self._pages.device
        there = numbers.to(device, non_blocking=True)
        into.positions.copy_(there[0, :size])
        into.slots.copy_(there[1, :size])
        plan.contexts.copy_(there[2, :longest])
        new = on_device(step.tokens, device)
        into.tokens[:tokens].copy_(new if step.carried is None else step.carried.into(new))
        plan.tables[:rows, :width].copy_(on_device(step.block_tables, device))
        for graph, groups in zip(captured.graphs, self._waits(captured), strict=True):
            for layers in groups:
                step.pass_layer(layers.start)
            graph.replay()
        return captured.logits[:rows]

    def _waits(self, captured: _Captured) -> list[tuple[range, ...]]:
        """Return which groups of layers have to be there in front of each graph."""
        if len(captured.graphs) == 1:
            return [self._groups]
        return [(layers,) for layers in self._groups]

    def _of(self, tokens: int, width: int, *, decode: bool, apart: bool) -> _Captured:
        size = next(padded for padded in (BATCHES if decode else APPENDS) if padded >= tokens)
        longest = next(pages for pages in CONTEXT_PAGES if pages >= width)
        key = _Key(decode, apart, size, longest)
        found = self._captured.get(key)
        if found is None:
            found = self._captured[key] = self._capture(key)
        return found

    def _capture(self, key: _Key) -> _Captured:
        device, decode, tokens, longest = self._pages.device, key.decode, key.tokens, key.pages
        plan: Plan = (
            ReplayedDecode(tokens, longest, device)
            if decode
            else ReplayedAppend(tokens, longest, device)
        )
        rows = tokens if decode else 1
        each = torch.arange(rows, device=device)
        step = StepInputs(
            tokens=torch.zeros(tokens, dtype=torch.int64, device=device),
            positions=torch.zeros(tokens, dtype=torch.int64, device=device),
            slots=torch.full((tokens,), self._scratch, dtype=torch.int64, device=device),
            block_tables=plan.tables,
            context_lengths=plan.contexts[:rows],
            query_starts=torch.zeros(rows + 1, dtype=torch.int32, device=device),
            sample_rows=each,
        )
        plan.tables.fill_(self._pages.shape[0] - 1)
        # Twice outside: kernels are compiled and the plan's work list is made by the first call.
        parts = 0
        for _ in range(2):
            parts = sum(1 for _ in self._compute(step, self._pages, plan))
            plan.cut()
        torch.cuda.synchronize(device)
        return self._record(step, plan, parts, each=1 if key.apart else parts)

    def _record(self, step: StepInputs, plan: Plan, parts: int, *, each: int) -> _Captured:
        """Capture a step of so many parts, `each` of them to a graph."""
        graphs: list[torch.cuda.CUDAGraph] = []
        computed = self._compute(step, self._pages, plan)
        logits = None
        for _ in range(0, parts, each):
            graph = torch.cuda.CUDAGraph()
            # Other threads copy blocks meanwhile; their calls are no part of this.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                if not graphs:
                    plan.cut()
                logits = deque(islice(computed, each), maxlen=1)[0]
            self._memory = graph.pool()
            graphs.append(graph)
        assert logits is not None
        return _Captured(graphs, step, plan, logits)
