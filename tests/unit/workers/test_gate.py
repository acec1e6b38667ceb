"""A load's gate: what a step may compute, and when it begins."""

import threading

import pytest
from kvworkers.stream.gate import Gate, layer_groups

from kvstore.core.errors import Unreachable
from tests.patience import PATIENCE_S


@pytest.mark.parametrize("layers", range(1, 130))
def test_groups_are_all_layers_in_order(layers: int) -> None:
    groups = layer_groups(layers)
    assert [layer for group in groups for layer in group] == list(range(layers))
    assert max(map(len, groups)) <= 8
    assert layers < 4 or len(groups[-1]) == 1, "what is computed behind the load's end is short"


def test_groups_of_an_eight_billion_model() -> None:
    assert [len(group) for group in layer_groups(32)] == [2, 2, 4, 8, 8, 4, 2, 1, 1]


def test_a_step_passes_what_has_come_and_waits_for_what_has_not() -> None:
    moved: list[int] = []
    gate = Gate(8, changed=lambda: moved.append(gate.come_groups))
    assert [len(group) for group in gate.groups] == [2, 2, 2, 1, 1]
    passed: list[int] = []

    def step() -> None:
        for layer in range(8):
            gate.pass_layer(layer)
            passed.append(layer)

    thread = threading.Thread(target=step)
    thread.start()
    for count in range(1, 6):
        assert len(passed) <= sum(len(group) for group in gate.groups[: count - 1])
        gate.come()
    gate.end()
    thread.join(PATIENCE_S)
    assert passed == list(range(8))
    assert moved == [1, 2, 3, 4, 5, 5]


def test_a_load_that_ends_early_lets_the_step_go_on() -> None:
    gate = Gate(8, changed=lambda: None)
    gate.come()

    def step() -> None:
        for layer in range(8):
            gate.pass_layer(layer)

    thread = threading.Thread(target=step)
    thread.start()
    assert thread.is_alive(), "it waits for the second group"
    gate.end()
    thread.join(PATIENCE_S)
    assert not thread.is_alive() and gate.come_groups == 1


def test_nothing_is_computed_over_a_load_that_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvworkers.stream.gate._PATIENCE_S", 0.01)
    gate = Gate(8, changed=lambda: None)
    gate.come()
    gate.pass_layer(0)
    with pytest.raises(Unreachable, match="layer 2"):
        gate.pass_layer(2)


def test_a_step_begins_at_once_alone_and_late_beside_others() -> None:
    gate = Gate(32, changed=lambda: None)
    begins = []
    for _ in range(9):
        begins.append((gate.lets_begin(alone=True), gate.lets_begin(alone=False)))
        gate.come()
    assert begins == [(True, False)] * 8 + [(True, True)]
