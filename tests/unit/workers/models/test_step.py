"""Values of a step are checked before a kernel trusts them."""

from dataclasses import replace

import pytest
import torch
from kvworkers.models import StepInputs

from kvstore.core.errors import BadInput
from tests.model_fixture import make_step

GOOD = make_step(([5, 6, 7], 14, [1, 0]), ([8], 0, [2]))


def _check(step: StepInputs) -> None:
    step.check(pages=3, vocab_size=10, max_model_tokens=17)


def test_a_step_inside_its_bounds_passes() -> None:
    _check(GOOD)
    _check(replace(GOOD, sample_rows=torch.empty(0, dtype=torch.int64)))


def test_table_entries_past_a_sequence_are_ignored() -> None:
    tables = GOOD.block_tables.clone()
    tables[1, 1] = 2**31 - 1
    _check(replace(GOOD, block_tables=tables))
    tables[1, 0] = 3
    with pytest.raises(BadInput, match="block_tables"):
        _check(replace(GOOD, block_tables=tables))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 10),
        ("tokens", -1),
        ("positions", 17),
        ("slots", 48),
        ("slots", -1),
        ("sample_rows", 4),
        ("sample_rows", -1),
        ("block_tables", -1),
    ],
)
def test_a_value_outside_is_refused_by_the_fields_name(field: str, value: int) -> None:
    changed = getattr(GOOD, field).clone()
    changed.view(-1)[0] = value
    with pytest.raises(BadInput, match=field):
        _check(replace(GOOD, **{field: changed}))


def test_fields_of_different_lengths_or_none_at_all_are_refused() -> None:
    for field in ("positions", "slots"):
        with pytest.raises(BadInput, match="as many"):
            _check(replace(GOOD, **{field: getattr(GOOD, field)[:-1]}))
    empty = torch.empty(0, dtype=torch.int64)
    with pytest.raises(BadInput, match="one at least"):
        _check(replace(GOOD, tokens=empty, positions=empty, slots=empty))
