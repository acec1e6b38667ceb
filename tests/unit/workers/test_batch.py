import torch
from kvworkers.engine.batch import build_step
from kvworkers.engine.sampling import SamplingParams
from kvworkers.engine.sequence import Request, Sequence
from kvworkers.engine.work import Work

from kvstore.core.names import Root, pack_tokens


def sequence(tokens: list[int], pages: list[int], computed: int) -> Sequence:
    request = Request(
        request_id="r", tokens=pack_tokens(tokens), sampling=SamplingParams(max_tokens=4)
    )
    made = Sequence(request, Root(b"r" * 32), arrived_ms=0.0)
    made.pages, made.computed = pages, computed
    return made


def test_a_ragged_batch_of_a_decode_a_chunk_and_a_last_chunk() -> None:
    decode = sequence(list(range(100, 133)), [7, 2, 9], 32)
    chunk = sequence(list(range(40)), [4, 5, 6], 0)
    last = sequence(list(range(200, 220)), [1, 3], 14)
    step = build_step(
        [Work(decode, 32, 1, True), Work(chunk, 0, 20, False), Work(last, 14, 6, True)]
    )
    assert step.tokens.tolist() == [132, *range(20), *range(214, 220)]
    assert step.positions.tolist() == [32, *range(20), *range(14, 20)]
    assert step.slots.tolist() == [
        9 * 16,
        *range(4 * 16, 5 * 16),
        *range(5 * 16, 5 * 16 + 4),
        16 + 14,
        16 + 15,
        *range(3 * 16, 3 * 16 + 4),
    ]
    assert step.block_tables.tolist() == [[7, 2, 9], [4, 5, 0], [1, 3, 0]]
    assert step.block_tables.dtype is torch.int32
    assert step.context_lengths.tolist() == [33, 20, 20]
    assert step.query_starts.tolist() == [0, 1, 21, 27]
    assert step.sample_rows.tolist() == [0, 26]


def test_a_step_that_samples_nothing_has_no_rows() -> None:
    step = build_step([Work(sequence(list(range(40)), [0, 1, 2], 0), 0, 16, False)])
    assert step.sample_rows.shape == (0,)
    assert step.block_tables.tolist() == [[0]]
