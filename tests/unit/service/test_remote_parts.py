"""Remote sessions, the bulk port's tickets over slots, and the list of peers."""

import json
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput, Refused
from kvstore.core.outcomes import Outcome, SettleOutcome
from kvstore.core.slots import SlotState
from kvstore.observe.metrics import PeerMetrics
from kvstore.service.bulk_port import BulkPort
from kvstore.service.peers import parse_peers
from kvstore.service.promotion import LOADER_SESSION
from kvstore.service.remote_sessions import RemoteSessions
from kvstore.service.roots import RootInfo
from kvstore.service.sessions import FIRST_REMOTE_SESSION, Session
from kvstore.tiers.peer import Neighbour
from kvstore.tiers.sums import block_sum
from kvstore.transport.bulk_wire import Operation
from tests.arena_fixture import ROOT, SHAPE, SmallStore, names, small_store

DONE, STALE = SettleOutcome.DONE, SettleOutcome.STALE


class Rig:
    def __init__(self, small: SmallStore, limit: int = 8) -> None:
        self.now_ms = 0.0
        self.small = small
        self.port = BulkPort(small.table, PeerMetrics(CollectorRegistry()), lambda: self.now_ms)
        self.sessions = RemoteSessions(small.store, self.port, session_ms=1_000, limit=limit)

    def session(self) -> tuple[Session, RootInfo]:
        session = self.sessions.open("client", self.now_ms)
        info = self.small.table.roots.open(ROOT, SHAPE, domain="d")
        session.roots[ROOT] = info
        return session, info

    def reserve(self, session: Session, info: RootInfo, count: int) -> list[int]:
        answer = self.small.store.acquire(
            session, info, b"".join(names(count)), reserve=count, first_block=0, now_ms=self.now_ms
        )
        return answer.reserved_slots

    def commit(self, session: Session, info: RootInfo, slots: list[int]) -> list[SettleOutcome]:
        refs = [(slot, self.small.table.generation[slot]) for slot in slots]
        return self.small.store.commit(session, info, refs, self.now_ms)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with small_store() as small:
        yield Rig(small)


def test_a_session_lives_as_long_as_it_is_heard_of(rig: Rig) -> None:
    first, info = rig.session()
    slots = rig.reserve(first, info, 3)
    rig.now_ms = 900
    second, _ = rig.session()
    rig.sessions.heard(first, 900)
    assert rig.sessions.expire(1_800) == 0
    assert rig.sessions.expire(1_900) == 2
    assert (first.closed, second.closed, len(rig.sessions)) == (True, True, 0)
    assert [rig.small.table.state[slot] for slot in slots] == [SlotState.FREE] * 3
    assert rig.small.store.sessions.by_number(first.number) is None


def test_numbers_are_the_nodes_own_and_reused_late(rig: Rig) -> None:
    seen = [rig.sessions.open("c", 0).number for _ in range(8)]
    assert seen == list(range(FIRST_REMOTE_SESSION, FIRST_REMOTE_SESSION + 8))
    with pytest.raises(Refused, match="8 remote sessions"):
        rig.sessions.open("c", 0)
    assert rig.sessions.expire(1_000) == 8
    rig.sessions._next = LOADER_SESSION - 1
    assert [rig.sessions.open("c", 0).number for _ in range(2)] == [
        LOADER_SESSION - 1,
        FIRST_REMOTE_SESSION,
    ]


def test_a_local_session_is_not_remote(rig: Rig) -> None:
    local, _ = rig.small.session(1)
    rig.sessions.heard(local, 5)
    assert rig.sessions.session_ms(local) == 0
    remote, _ = rig.session()
    assert rig.sessions.session_ms(remote) == 1_000


def test_only_filled_slots_are_committed_and_they_are_sealed_with_their_sum(rig: Rig) -> None:
    session, info = rig.session()
    slots = rig.reserve(session, info, 3)
    ticket = rig.port.take(session, info, slots, host="h")
    passage = rig.port._redeem(ticket.token, Operation.SEND, "h")
    assert passage is not None
    assert rig.commit(session, info, slots) == [SettleOutcome.NOT_YOURS] * 3
    view = passage.view(0)
    view[:] = b"\7" * len(view)
    found = passage.digest(view)
    assert found == block_sum(view[: SHAPE.payload_bytes], SHAPE.shares)
    assert passage.accept(0, found) is Outcome.HIT
    assert not any(view[SHAPE.payload_bytes :]), "padding carries nothing of an earlier tenant"
    assert rig.commit(session, info, slots) == [DONE, SettleOutcome.NOT_YOURS,
                                                SettleOutcome.NOT_YOURS]  # fmt: skip
    assert rig.small.store.summed == [(slots[0], found)]
    assert not rig.small.store.to_seal, "nothing is hashed twice"
    passage.done()
    assert not any(rig.small.table.pins)


def test_a_slot_stands_on_one_ticket_only(rig: Rig) -> None:
    session, info = rig.session()
    slots = rig.reserve(session, info, 2)
    ticket = rig.port.take(session, info, slots[:1], host="h")
    with pytest.raises(Refused, match="ticket already"):
        rig.port.take(session, info, slots, host="h")
    rig.port.expire(1e9)
    assert rig.port._redeem(ticket.token, Operation.SEND, "h") is None
    rig.port.take(session, info, slots, host="h")


def test_slots_given_back_while_they_are_filled_drain(rig: Rig) -> None:
    session, info = rig.session()
    slots = rig.reserve(session, info, 2)
    ticket = rig.port.take(session, info, slots, host="h")
    passage = rig.port._redeem(ticket.token, Operation.SEND, "h")
    assert passage is not None
    rig.sessions.end(session)
    states = [rig.small.table.state[slot] for slot in slots]
    assert states == [SlotState.DRAINING] * 2, "the thread may still write there"
    assert passage.accept(1, bytes(16)) is Outcome.REFUSED
    passage.done()
    assert [rig.small.table.state[slot] for slot in slots] == [SlotState.FREE] * 2
    assert rig.small.table.used_bytes == rig.small.table.reserved_bytes == 0


def test_a_duplicate_of_a_slot_that_is_still_on_its_ticket_drains(rig: Rig) -> None:
    session, info = rig.session()
    slots = rig.reserve(session, info, 2)
    ticket = rig.port.take(session, info, slots, host="h")
    passage = rig.port._redeem(ticket.token, Operation.SEND, "h")
    assert passage is not None
    assert passage.accept(0, bytes(16)) is Outcome.HIT
    rig.now_ms = 500  # its claim is over: another may compute the same block
    local, _ = rig.small.session(1)
    rig.small.put(local, info, names(1), rig.now_ms)
    assert rig.commit(session, info, slots[:1]) == [SettleOutcome.DUPLICATE]
    assert rig.small.table.state[slots[0]] == SlotState.DRAINING
    passage.done()
    assert rig.small.table.state[slots[0]] == SlotState.FREE


def test_a_loan_keeps_its_slots(rig: Rig) -> None:
    local, info = rig.small.session(1)
    rig.small.put(local, info, names(2), 0)
    slots = [slot for slot, state in enumerate(rig.small.table.state) if state][:2]
    rig.port.lend(slots, session=0, host="h")
    assert [rig.small.table.pins[slot] for slot in slots] == [1, 1]
    rig.port.expire(1e9)
    assert not any(rig.small.table.pins)


def test_what_a_lease_does_not_hold_is_not_read(rig: Rig) -> None:
    store, table = rig.small.store, rig.small.table
    session, info = rig.session()
    local, _ = rig.small.session(1)
    rig.small.put(local, info, names(2), 0)
    answer = store.acquire(session, info, b"".join(names(1)), reserve=0, first_block=0, now_ms=0)
    slot, other = answer.slots[0], 1 - answer.slots[0]
    generation = table.generation[slot]
    assert store.readable(session, info, answer.lease, [(slot, generation)]) == [slot]
    with pytest.raises(Refused, match="not held"):
        store.readable(local, info, answer.lease, [(slot, generation)])
    with pytest.raises(BadInput, match="not one of lease"):
        store.readable(session, info, answer.lease, [(other, 1)])
    with pytest.raises(Refused, match="not readable"):
        store.readable(session, info, answer.lease, [(slot, generation + 1)])
    with pytest.raises(BadInput, match="twice"):
        store.writable(session, info, [(slot, 1), (slot, 1)])
    with pytest.raises(BadInput, match="not reserved"):
        store.writable(session, info, [(slot, generation)])


def listed(*entries: object) -> str:
    return json.dumps({"peers": list(entries)})


def test_the_list_leaves_its_reader_out() -> None:
    text = listed({"name": "a", "address": "h:1"}, {"name": "b", "address": "h:2"})
    assert parse_peers(text, "b") == [Neighbour("a", "h:1")]
    assert parse_peers(listed(), "b") == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no JSON"),
        ("[]", "wants 'peers'"),
        ('{"peers": 3}', "wants 'peers'"),
        (listed(3), "wants a name"),
        (listed({"name": "", "address": "h:1"}), "wants a name"),
        (listed({"name": "n" * 300, "address": "h:1"}), "wants a name"),
        (listed({"name": "a"}), "wants an address"),
        (listed({"name": "a", "address": "h"}), "wants an address"),
        (listed({"name": "a", "address": "h:1"}, {"name": "a", "address": "h:2"}), "twice"),
        (listed(*({"name": str(n), "address": "h:1"} for n in range(1_025))), "at most 1024"),
    ],
)
def test_a_list_that_makes_no_sense_names_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse_peers(text, "me")
