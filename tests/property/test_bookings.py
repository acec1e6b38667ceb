"""Running sums and the tree of coming prefixes against a model that walks all bookings."""

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.core.names import BlockName, Root
from kvstore.router.booking import REPORT_DELAY_MS, Booking, Bookings
from kvstore.router.score import Work

ROOTS = [Root(bytes([value]) * 32) for value in range(2)]
LIFETIME_MS = 1_000.0
PATHS = st.lists(st.integers(0, 1), max_size=9)


def names(root: Root, path: Sequence[int]) -> list[BlockName]:
    """Names that are equal exactly where root and path so far are."""
    return [BlockName(root[:1] + bytes(path[: at + 1])) for at in range(len(path))]


def common(first: Sequence[BlockName], second: Sequence[BlockName]) -> int:
    length = 0
    for mine, theirs in zip(first, second, strict=False):
        if mine != theirs:
            break
        length += 1
    return length


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_ms = 0.0
        self.bookings = Bookings(lifetime_ms=LIFETIME_MS)
        self.model: list[Booking] = []
        self.first_tokens: set[int] = set()

    def of(self, worker: str) -> list[Booking]:
        return [one for one in self.model if one.worker == worker]

    @rule(
        worker=st.sampled_from("ab"), root=st.sampled_from(ROOTS), path=PATHS,
        hit=st.integers(0, 50), uncached=st.integers(0, 50), device=st.sampled_from("xy"),
    )  # fmt: skip
    def book(
        self, worker: str, root: Root, path: list[int], hit: int, uncached: int, device: str
    ) -> None:
        self.forget_old()
        self.model.append(
            self.bookings.book(
                worker,
                root,
                names(root, path),
                hit_tokens=hit,
                uncached_tokens=uncached,
                now_ms=self.now_ms,
                loading={device: hit},
            )
        )

    @rule(pick=st.integers(0, 6), whole=st.booleans())
    def end(self, pick: int, whole: bool) -> None:
        if pick >= len(self.model):
            assert self.bookings.complete(10_000 + pick) is None
        elif whole:
            gone = self.model.pop(pick)
            assert self.bookings.complete(gone.number) is gone
        else:
            self.first_tokens.add(self.model[pick].number)
            self.bookings.prefilled(self.model[pick])

    @rule(passed_ms=st.sampled_from([1.0, 60.0, 400.0]))
    def wait(self, passed_ms: float) -> None:
        self.now_ms += passed_ms
        self.bookings.expire(self.now_ms)
        self.forget_old()

    def forget_old(self) -> None:
        self.model = [one for one in self.model if one.expires_ms > self.now_ms]

    @rule(worker=st.sampled_from("ab"), age_ms=st.integers(0, 300))
    def queue(self, worker: str, age_ms: int) -> None:
        load_ms = self.now_ms - age_ms
        expected = [
            Work.of(one.uncached_tokens, one.hit_tokens)
            for one in self.of(worker)
            if one.made_ms >= load_ms - REPORT_DELAY_MS and one.number not in self.first_tokens
        ]
        found = self.bookings.queued(worker, load_ms=load_ms)[0]
        assert found.tokens == sum(work.tokens for work in expected)
        depths = sum(work.token_depths for work in expected)
        assert found.token_depths == pytest.approx(depths, abs=1e-6)

    @rule(root=st.sampled_from(ROOTS), path=PATHS)
    def coming(self, root: Root, path: list[int]) -> None:
        asked = names(root, path)
        longest: dict[str, int] = {}
        for one in self.model:
            blocks = common(one.names, asked) if one.root == root else 0
            if blocks:
                longest[one.worker] = max(blocks, longest.get(one.worker, 0))
        assert self.bookings.coming_blocks(root, asked) == longest

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.bookings) == len(self.model)
        for worker in "ab":
            assert self.bookings.in_flight(worker) == len(self.of(worker))
        loading = [one for one in self.model if one.number not in self.first_tokens]
        for device in "xy":
            expected = sum(one.loading.get(device, 0) for one in loading)
            assert self.bookings.loading(device) == expected


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBookings = Machine.TestCase
