import json

import numpy as np
import pytest
import torch
from kvworkers.models.step import Carried
from kvworkers.ranks.messages import (
    LENGTHS,
    MAX_ARRAY_BYTES,
    Frame,
    Kind,
    Orders,
    check_lengths,
    copies_of,
    copy_frame,
    move_frame,
    pack,
    step_frame,
    step_of,
    unpack,
)

from kvstore.core.errors import BadInput
from tests.model_fixture import make_step

ORDERS = Orders(
    model="m", ranks=3, device="cpu", threads=None, fidelity="exact", pool_bytes=None,
    step_tokens=512, max_running=16, rendezvous="r", deadline_ms=1_000,
)  # fmt: skip


def over_the_wire(frame: Frame) -> Frame:
    data = pack(frame)
    head_bytes, array_bytes = LENGTHS.unpack_from(data)
    at = LENGTHS.size + head_bytes
    assert len(data) == at + array_bytes
    return unpack(data[LENGTHS.size : at], data[at:])


def test_a_step_arrives_as_it_was_sent() -> None:
    step = make_step(([5, 6, 7], 14, [9, 4]), ([8], 0, [3]))
    frame = over_the_wire(step_frame(7, step))
    assert frame.kind is Kind.STEP and frame.number("number") == 7
    assert frame.facts["carried"] is False
    there = step_of(frame)
    for name in ("tokens", "positions", "slots", "block_tables", "context_lengths",
                 "query_starts", "sample_rows"):  # fmt: skip
        sent, came = getattr(step, name), getattr(there, name)
        assert came.dtype == sent.dtype and came.tolist() == sent.tolist(), name
    there.check(pages=16, vocab_size=199, max_model_tokens=512)


def test_pages_to_copy_arrive_in_their_order() -> None:
    frame = over_the_wire(copy_frame(9, [(3, 11), (3, 7), (0, 2)]))
    assert frame.kind is Kind.COPY and frame.number("number") == 9
    assert copies_of(frame) == [(3, 11), (3, 7), (0, 2)]


def test_a_step_without_sampled_rows_and_one_with_carried_tokens() -> None:
    quiet = over_the_wire(step_frame(1, make_step(([5, 6], 0, [0]), sample=[])))
    assert step_of(quiet).sample_rows.shape == (0,)
    step = make_step(([5], 3, [0]))
    from dataclasses import replace

    carried = replace(step, carried=Carried(torch.tensor([4]), torch.tensor([0])))
    frame = over_the_wire(step_frame(2, carried))
    assert frame.facts["carried"] is True
    assert step_of(frame).carried is None, "the tokens go another way"


def test_copies_and_orders_arrive() -> None:
    frame = over_the_wire(
        move_frame(3, store=True, alone=False, raw=False, offsets=[1 << 40, 4096], pages=[7, 8])
    )
    assert (frame.number("job"), frame.facts["store"], frame.facts["alone"]) == (3, True, False)
    assert frame.arrays["offsets"].tolist() == [1 << 40, 4096]
    assert frame.arrays["pages"].tolist() == [7, 8]
    assert Orders.of(over_the_wire(ORDERS.frame())) == ORDERS


def said(**changed: object) -> bytes:
    fields: dict[str, object] = {"kind": "step", "facts": {}, "arrays": []}
    return json.dumps(fields | changed).encode()


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"no json", b""),
        (b"[]", b""),
        (said(kind="song"), b""),
        (said(facts=[]), b""),
        (said(arrays=[["a", "int64", [2]]]), b"\0" * 8),
        (said(arrays=[["a", "object", [1]]]), b"\0" * 8),
        (said(arrays=[["a", "int64", [-1]]]), b"\0" * 8),
        (said(arrays=[["a", "int64", [1.0]]]), b"\0" * 8),
        (said(arrays=[["a", "int64"]]), b"\0" * 8),
        (said(), b"left over"),
    ],
)
def test_other_bytes_are_refused(head: bytes, body: bytes) -> None:
    with pytest.raises(BadInput):
        unpack(head, body)


def test_bounds_and_missing_facts_are_refused() -> None:
    for lengths in ((0, 0), (1 << 30, 0), (10, MAX_ARRAY_BYTES + 1)):
        with pytest.raises(BadInput, match="bytes between ranks"):
            check_lengths(*lengths)
    with pytest.raises(BadInput, match="bytes between ranks"):
        pack(Frame(Kind.STEP, {}, {"a": np.zeros(MAX_ARRAY_BYTES // 8 + 1, dtype=np.int64)}))
    with pytest.raises(BadInput, match="without a number 'job'"):
        Frame(Kind.MOVED, {"job": True}).number("job")
    with pytest.raises(BadInput, match="a step without tokens"):
        step_of(Frame(Kind.STEP))
    with pytest.raises(BadInput, match="orders of a rank"):
        Orders.of(Frame(Kind.ORDERS, {"model": "m"}))
