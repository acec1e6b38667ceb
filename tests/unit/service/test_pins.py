"""Pins and clearing over a small arena."""

from kvstore.core.names import Root
from kvstore.core.outcomes import MissReason
from kvstore.core.slots import SlotState
from kvstore.service.clearing import clear
from kvstore.service.pins import Pins
from kvstore.service.roots import keys_of
from tests.arena_fixture import ROOT, SmallStore, names, small_store


def sealed(small: SmallStore, prompt: list[bytes], number: int = 1) -> None:
    """Put a prompt and seal it."""
    session, info = small.session(number)
    small.put(session, info, prompt, 0.0)
    slots = [small.table.index[key] for key in keys_of(info, b"".join(prompt))]
    small.table.seal(slots, [bytes(16)] * len(slots))
    small.store.to_seal.clear()


def test_a_pinned_block_outlives_pressure_until_its_time() -> None:
    with small_store(8) as small:
        prompt = names(4)
        sealed(small, prompt)
        _, info = small.session(2)
        packed = b"".join(prompt)
        assert small.store.pins.pin(info, packed, ttl_ms=100, now_ms=0.0) == 2, "a quarter of 8"
        sealed(small, names(6, 9), 3)
        held = [small.table.find(info, key, name) is not None
                for key, name in zip(keys_of(info, packed), prompt, strict=True)]  # fmt: skip
        assert held == [True, True, False, False]
        assert small.store.pins.expire(99.0) == 0
        assert small.store.expire(100.0) == 0, "no lease ended"
        assert len(small.store.pins) == 0
        assert not any(small.table.pins)


def test_pins_are_prolonged_and_ended_by_word() -> None:
    with small_store(16) as small:
        prompt = names(3)
        sealed(small, prompt)
        _, info = small.session(2)
        packed = b"".join(prompt)
        pins = Pins(small.table, 16 * 4096)
        assert pins.pin(info, packed, 100, 0.0) == 3
        assert pins.pin(info, packed, 10, 5.0) == 3, "a shorter time changes nothing"
        assert pins.expire(99.0) == 0
        assert pins.unpin(info, packed[:64]) == 2
        assert pins.unpin(info, packed[:64]) == 0
        assert (len(pins), sum(small.table.pins)) == (1, 1)
        assert pins.expire(100.0) == 1
        assert pins.pin(info, b"".join(names(2, 5)), 10, 0.0) == 0, "not there"


async def test_a_cleared_root_is_gone_and_another_is_not() -> None:
    with small_store(16) as small:
        prompt = names(5)
        sealed(small, prompt)
        other = Root(bytes(31) + b"o")
        session, info = small.session(2)
        theirs = small.table.roots.open(other, info.shape, domain="d")
        small.put(session, theirs, names(3, 4), 0.0)
        assert await clear(small.store, (), Root(bytes(32))) == 0
        assert await clear(small.store, (), ROOT) == 5
        assert small.store.acquire(
            session, info, b"".join(prompt), reserve=0, first_block=0, now_ms=1.0
        ).reason is MissReason.ABSENT  # fmt: skip
        assert await clear(small.store, (), None) == 3
        assert small.table.used_bytes == 0 and not small.table.index


async def test_what_is_leased_is_void_at_once_and_free_when_the_lease_ends() -> None:
    with small_store(16) as small:
        prompt = names(4)
        sealed(small, prompt)
        session, info = small.session(2)
        packed = b"".join(prompt)
        small.store.pins.pin(info, packed, 1_000, 0.0)
        held = small.store.acquire(session, info, packed, reserve=0, first_block=0, now_ms=1.0)
        assert await clear(small.store, (), ROOT) == 4
        states = {small.table.state[slot] for slot in held.slots}
        assert states == {SlotState.DRAINING}, "a reader that looks again sees that it is void"
        again = small.store.acquire(session, info, packed, reserve=0, first_block=0, now_ms=1.0)
        assert (again.slots, again.reason) == ([], MissReason.ABSENT)
        small.store.release(session, [held.lease])
        assert small.table.counts[SlotState.DRAINING] == 0
        assert not any(small.table.pins) and len(small.store.pins) == 0
        small.put(session, info, prompt, 2.0)
        assert small.table.used_bytes == 4 * 4096
