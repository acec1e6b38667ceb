"""The parts of the NVMe tier that decide: rows, slots and classes, the breaker, restarts."""

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.names import BlockName
from kvstore.directory.policy import block_key
from kvstore.testing.contracts import OTHER_ROOT, ROOT, block
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.block_rows import NO_ROW, ROW_BYTES, pack_row, slot_bytes, unpack_row
from kvstore.tiers.breaker import Breaker, BreakerState
from kvstore.tiers.nvme_restart import chains, read_rows
from kvstore.tiers.nvme_space import NvmeSpace

HEADER = replace(block(3).header, parent=77)


def name(number: int) -> BlockName:
    return BlockName(hashlib.sha256(b"%d" % number).digest())


class TestRows:
    def test_a_row_says_everything_about_its_block(self) -> None:
        assert unpack_row(pack_row(HEADER)) == HEADER

    def test_every_flipped_bit_is_seen(self) -> None:
        row = pack_row(HEADER)
        for bit in range(8 * ROW_BYTES):
            spoilt = bytearray(row)
            spoilt[bit // 8] ^= 1 << bit % 8
            assert unpack_row(bytes(spoilt)) is None, f"bit {bit}"

    def test_nothing_is_no_row(self) -> None:
        assert unpack_row(NO_ROW) is None

    @pytest.mark.parametrize(
        "impossible",
        [
            replace(HEADER, payload_bytes=0),
            replace(HEADER, payload_bytes=65 << 20),
            replace(HEADER, shares=7),
        ],
    )
    def test_impossible_sizes_are_no_row(self, impossible: BlockHeader) -> None:
        assert unpack_row(pack_row(impossible)) is None

    def test_a_slot_is_a_page_and_the_padded_block(self) -> None:
        assert slot_bytes(1) == slot_bytes(4096) == 8192
        assert slot_bytes(4097) == 12_288


class TestRestart:
    def rows(self, *headers: BlockHeader | None) -> bytes:
        return b"".join(NO_ROW if header is None else pack_row(header) for header in headers)

    def test_whole_rows_are_found_by_slot(self) -> None:
        other = block(9, root=OTHER_ROOT).header
        found = read_rows(self.rows(None, HEADER, None, other), slot_bytes(HEADER.payload_bytes))
        assert found.slots == [1, 3]
        assert found.keys == [
            block_key(HEADER.root, HEADER.name), block_key(other.root, other.name)
        ]  # fmt: skip
        assert found.names == HEADER.name + other.name
        assert [found.roots[at] for at in found.root_of] == [ROOT, OTHER_ROOT]
        assert (found.parents, found.torn) == ([77, 0], 0)

    def test_torn_rows_and_other_sizes_are_left_out_and_counted(self) -> None:
        torn = bytearray(pack_row(HEADER))
        torn[70] ^= 1
        big = replace(HEADER, payload_bytes=64_000)
        raw = bytes(torn) + self.rows(HEADER, big)
        found = read_rows(raw, slot_bytes(HEADER.payload_bytes))
        assert (found.slots, found.torn) == ([1], 2)

    def test_rows_of_another_version_are_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvstore.tiers.block_rows._VERSION", 2)
        raw = self.rows(HEADER)
        monkeypatch.undo()
        assert read_rows(raw, slot_bytes(HEADER.payload_bytes)).slots == []

    @given(st.dictionaries(st.integers(1, 30), st.integers(0, 30), max_size=30))
    def test_chains_hold_every_block_once_and_behind_its_parent(self, of: dict[int, int]) -> None:
        told: list[int] = []
        for parent, run in chains(list(of), list(of.values())):
            assert parent == 0 or parent in told
            told += run
        assert sorted(told) == sorted(of)

    def test_a_prompt_is_one_run_and_branches_follow_it(self) -> None:
        runs = list(chains([3, 1, 2, 8, 9], [2, 0, 1, 3, 3]))
        assert runs[0] == (0, [1, 2, 3])
        assert sorted(runs[1:]) == [(3, [8]), (3, [9])]


class TestSpace:
    def space(self) -> NvmeSpace:
        return NvmeSpace(16 * 64 * 4096)

    def test_blocks_are_found_by_full_name(self) -> None:
        space = self.space()
        space.add(0, 8192)
        place = space.take(8192)
        assert place is not None
        space.hold(place, ROOT, name(1))
        space.release(place)
        assert space.find(ROOT, name(1)) == place
        assert space.find(OTHER_ROOT, name(1)) is None
        # The same key by another name: never found as this block.
        twin = BlockName(name(1)[:8] + bytes(24))
        assert space.find(ROOT, twin) is None

    def test_a_place_in_use_is_not_given_away(self) -> None:
        space = self.space()
        segment = space.add(0, 64 * 4096)
        place = space.take(64 * 4096)
        assert place is not None and segment.slots == 1
        space.hold(place, ROOT, name(1))
        space.release(place)
        space.use(place)
        space.drop(place)
        assert space.take(64 * 4096) is None, "a reader is still there"
        space.release(place)
        assert space.take(64 * 4096) == place

    def test_a_class_takes_the_emptiest_idle_segment_of_another(self) -> None:
        space = self.space()
        for number in range(2):
            space.add(number, 8192)
        places = [space.take(8192) for _ in range(33)]  # 32 a segment
        for at, place in enumerate(places):
            assert place is not None
            space.hold(place, ROOT, name(at))
            space.release(place)
        found = space.victim_segment(4096 * 64, space.is_idle)
        assert found is not None and (found[0].number, len(found[1])) == (1, 1)
        space.use(found[1][0])
        found = space.victim_segment(4096 * 64, space.is_idle)
        assert found is not None and found[0].number == 0
        assert space.victim_segment(8192, space.is_idle) is None

    def test_a_scan_sees_every_block_once(self) -> None:
        space = self.space()
        for number in (0, 2, 5):
            space.add(number, 16_384)
        wanted = set()
        for at in range(40):
            place = space.take(16_384)
            assert place is not None
            space.hold(place, ROOT, name(at))
            space.release(place)
            wanted.add(name(at))
        seen: list[bytes] = []
        cursor: int | None = 0
        while cursor is not None:
            found, cursor = space.scan(cursor, 7)
            seen += [one.name for one in found]
        assert sorted(seen) == sorted(wanted)

    def test_what_two_segments_hold_is_listed_once(self) -> None:
        space = self.space()
        names = [name(1), name(2)]
        keys = [block_key(ROOT, one) for one in names]
        first = space.restore(space.add(0, 8192), [4, 7], keys, b"".join(names), [ROOT], [0, 0])
        again = space.restore(
            space.add(1, 8192), [0, 1], [keys[1], block_key(ROOT, name(3))],
            name(2) + name(3), [ROOT], [0, 0],
        )  # fmt: skip
        assert (first, again, len(space)) == ([], [0], 3)
        assert space.used_bytes == 3 * 8192
        assert all(space.find(ROOT, name(n)) is not None for n in (1, 2, 3))

    def test_blocks_too_big_for_a_segment_have_no_place(self) -> None:
        assert self.space().new_number(65 * 4096) is None
        assert NvmeSpace(4096).new_number(8192) is None


class TestBreaker:
    def test_it_opens_after_failures_in_a_row_and_probes_after_a_pause(self) -> None:
        breaker = Breaker(threshold=2, pause_ms=100)
        breaker.failed(0)
        breaker.succeeded()
        breaker.failed(0)
        assert breaker.enter(0)
        breaker.failed(0)
        assert (breaker.state(50), breaker.enter(50)) == (BreakerState.OPEN, False)
        assert breaker.state(100) is BreakerState.HALF_OPEN
        assert breaker.enter(100) and not breaker.enter(100), "one probe at a time"
        breaker.succeeded()
        assert breaker.state(100) is BreakerState.CLOSED

    def test_a_failed_probe_doubles_the_pause_up_to_a_bound(self) -> None:
        breaker = Breaker(threshold=1, pause_ms=100, pause_max_ms=300)
        now, pauses = 0.0, []
        for _ in range(4):
            breaker.failed(now)
            ends = next(t for t in range(10_000) if breaker.would_enter(now + t))
            pauses.append(ends)
            now += ends
            assert breaker.enter(now)
        assert pauses == [100, 200, 300, 300]
        assert breaker.opened == 4

    def test_a_probe_that_says_nothing_leaves_room_for_another(self) -> None:
        breaker = Breaker(threshold=1, pause_ms=100)
        breaker.failed(0)
        assert breaker.enter(100)
        breaker.abandoned()
        assert breaker.enter(100)

    def test_late_ends_do_not_prolong_the_pause(self) -> None:
        breaker = Breaker(threshold=1, pause_ms=100)
        breaker.failed(0)
        breaker.failed(90)
        assert breaker.state(100) is BreakerState.HALF_OPEN
