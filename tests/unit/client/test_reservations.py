"""Strays are found, and nothing that somebody holds is ever taken for one."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.client.replies import SlotRef
from kvstore.client.reservations import Reservations
from kvstore.directory.events import TierKind


def ref(slot: int, generation: int) -> SlotRef:
    return SlotRef(slot, generation, 0, TierKind.DRAM, 1)


def test_a_stray_is_reported_at_the_second_look() -> None:
    book = Reservations()
    assert book.look({4: 1}) == []
    assert book.look({4: 1}) == [(4, 1)]
    assert book.look({}) == []


def test_an_answer_that_arrives_between_two_looks_clears_its_slots() -> None:
    book = Reservations()
    assert book.look({4: 1}) == []
    book.hold([ref(4, 1)])
    assert book.look({4: 1}) == []


def test_a_slot_reserved_again_is_a_new_suspect() -> None:
    book = Reservations()
    assert book.look({4: 1}) == []
    assert book.look({4: 2}) == []
    assert book.look({4: 2}) == [(4, 2)]


def test_settling_an_old_generation_does_not_let_go_of_the_new_one() -> None:
    book = Reservations()
    book.hold([ref(4, 2)])
    book.settle([ref(4, 1)])
    assert len(book) == 1
    book.settle([ref(4, 2)])
    assert len(book) == 0


class Books(RuleBasedStateMachine):
    """A node reserves, answers arrive or are lost; a call ends between any two looks."""

    def __init__(self) -> None:
        super().__init__()
        self.book = Reservations()
        self.table: dict[int, int] = {}
        self.held: dict[int, int] = {}
        self.lost: dict[int, int] = {}
        self.generation = 0

    @rule(slot=st.integers(0, 5), answered=st.booleans())
    def reserve(self, slot: int, answered: bool) -> None:
        if slot in self.table:
            return
        self.generation += 1
        self.table[slot] = self.generation
        if answered:
            self.held[slot] = self.generation
            self.book.hold([ref(slot, self.generation)])
        else:
            self.lost[slot] = self.generation

    @rule(slot=st.integers(0, 5))
    def settle(self, slot: int) -> None:
        if slot in self.held:
            self.book.settle([ref(slot, self.held.pop(slot))])
            del self.table[slot]

    @rule()
    def look(self) -> None:
        for slot, generation in self.book.look(self.table):
            assert self.lost.pop(slot) == generation
            del self.table[slot]

    @invariant()
    def two_looks_clean_everything(self) -> None:
        assert self.table == self.held | self.lost

    def teardown(self) -> None:
        self.look()
        self.look()
        assert not self.lost


TestBooks = Books.TestCase
