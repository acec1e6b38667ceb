"""Turns a planned step into the flat ragged tensors that a model computes. Pure."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kvstore.core.limits import BLOCK_TOKENS
from kvworkers.engine.sequence import Sequence as Run
from kvworkers.engine.work import Work
from kvworkers.models.step import Carried, StepInputs


def build_step(
    works: Sequence[Work], before: Mapping[Run, int] | None = None, chosen: Tensor | None = None
) -> StepInputs:
    """Return the inputs of one step; work i is sequence i of the batch.

    Row j of the logits belongs to the j-th work with `samples`. `chosen` int64 [rows] holds what
    the step before chose where the host has not seen it, `before` each sequence's row of it.
    """
    assert works
    counts = np.array([work.count for work in works])
    ends = np.cumsum(counts)
    total = int(ends[-1])
    tokens, positions, slots = (np.empty(total, dtype=np.int64) for _ in range(3))
    sources = np.full(total, -1, dtype=np.int64)
    contexts = np.array([work.start + work.count for work in works], dtype=np.int32)
    tables = np.zeros((len(works), -(-int(contexts.max()) // BLOCK_TOKENS)), dtype=np.int32)
    for row, (work, end) in enumerate(zip(works, ends.tolist(), strict=True)):
        sequence, start, stop = work.sequence, work.start, work.start + work.count
        first = end - work.count
        pages = sequence.page_table()
        used = -(-stop // BLOCK_TOKENS)
        tables[row, :used] = pages[:used]
        if work.count == 1:
            positions[first] = start
            slots[first] = pages[start // BLOCK_TOKENS] * BLOCK_TOKENS + start % BLOCK_TOKENS
        else:
            places = positions[first:end] = np.arange(start, stop)
            slots[first:end] = pages[places // BLOCK_TOKENS] * BLOCK_TOKENS + places % BLOCK_TOKENS
        if start == len(sequence.tokens):
            assert before is not None
            tokens[first], sources[first] = 0, before[sequence]
        else:
            tokens[first:end] = sequence.tokens[start:stop]
    samples = np.array([work.samples for work in works])
    carried = (sources >= 0).any()
    return StepInputs(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        block_tables=torch.from_numpy(tables),
        context_lengths=torch.from_numpy(contexts),
        query_starts=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
        sample_rows=torch.from_numpy((ends - 1)[samples]),
        # Read once each: the event loop takes it away when the load ends.
        gates=tuple(gate for work in works if (gate := work.sequence.gate) is not None),
        carried=Carried(chosen, torch.from_numpy(sources))
        if carried and chosen is not None
        else None,
    )
