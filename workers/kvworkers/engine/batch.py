"""Turns a planned step into the flat ragged tensors that a model computes. Pure."""

from collections.abc import Sequence

import numpy as np
import torch

from kvstore.core.limits import BLOCK_TOKENS
from kvworkers.engine.scheduler import Work
from kvworkers.models.step import StepInputs


def build_step(works: Sequence[Work]) -> StepInputs:
    """Return the inputs of one step; work i is sequence i of the batch.

    Row j of the logits belongs to the j-th work with `samples`.
    """
    assert works
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    sample_rows: list[int] = []
    width = max(_pages_used(work) for work in works)
    tables = np.zeros((len(works), width), dtype=np.int32)
    for row, work in enumerate(works):
        pages, end = work.sequence.pages, work.start + work.count
        tokens.extend(work.sequence.tokens[work.start : end])
        positions.extend(range(work.start, end))
        slots.extend(
            pages[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS
            for at in range(work.start, end)
        )
        used = _pages_used(work)
        tables[row, :used] = pages[:used]
        starts.append(len(tokens))
        if work.samples:
            sample_rows.append(len(tokens) - 1)
    return StepInputs(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        block_tables=torch.from_numpy(tables),
        context_lengths=torch.tensor([w.start + w.count for w in works], dtype=torch.int32),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64),
    )


def _pages_used(work: Work) -> int:
    return -(-(work.start + work.count) // BLOCK_TOKENS)
