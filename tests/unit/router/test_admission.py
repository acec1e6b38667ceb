from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.router import admission
from kvstore.router.admission import MAX_RETRY_MS, MIN_RETRY_MS, Claim, FairClock, WaitingRoom


def served(room: WaitingRoom[str], count: int, tokens: float = 100.0) -> list[str]:
    found = []
    for at in range(count):
        ticket = room.first()
        assert ticket is not None
        room.grant(ticket, tokens, float(at))
        found.append(ticket.item)
    return found


def test_priorities_go_first_then_the_earliest_deadline() -> None:
    room: WaitingRoom[str] = WaitingRoom(bound=9)
    for item, claim in {
        "late": Claim(deadline_ms=900), "soon": Claim(deadline_ms=100), "urgent": Claim(priority=1)
    }.items():  # fmt: skip
        room.enter(item, claim)
    assert served(room, 3) == ["urgent", "soon", "late"]
    assert room.first() is None


def test_domains_share_by_weight_whatever_they_ask_for() -> None:
    room: WaitingRoom[str] = WaitingRoom(bound=900, clock=FairClock({"big": 3.0}))
    for _ in range(200):
        room.enter("big", Claim("big"))
    for _ in range(400):
        room.enter("greedy", Claim("greedy"))
    counts = Counter(served(room, 100))
    assert counts["big"] == pytest.approx(75, abs=2)


def test_tokens_count_and_not_requests() -> None:
    room: WaitingRoom[str] = WaitingRoom(bound=900)
    for _ in range(100):
        room.enter("long", Claim("long"))
        room.enter("short", Claim("short"))
    counts: Counter[str] = Counter()
    for _ in range(88):
        ticket = room.first()
        assert ticket is not None
        room.grant(ticket, 1_000.0 if ticket.item == "long" else 100.0, 0.0)
        counts[ticket.item] += 1
    assert counts["long"] == pytest.approx(8, abs=1)


def test_nobody_saves_up_time_it_did_not_use() -> None:
    clock = FairClock()
    room: WaitingRoom[str] = WaitingRoom(bound=900, clock=clock)
    for _ in range(50):
        clock.charge("busy", 1_000.0)
    for _ in range(50):
        room.enter("busy", Claim("busy"))
        room.enter("idle", Claim("idle"))
    counts = Counter(served(room, 40))
    assert 0 < counts["idle"] - counts["busy"] <= 10, "ahead by one request of the other at most"


def test_a_full_room_turns_away_the_weakest_claim() -> None:
    room: WaitingRoom[str] = WaitingRoom(bound=3, clock=FairClock({"a": 2.0}))
    for item in ("b1", "b2", "a1"):
        assert room.enter(item, Claim(item[0]))[1] is None
    ticket, gone = room.enter("b3", Claim("b"))
    assert gone is ticket, "the domain that holds most for its weight, and came last"
    ticket, gone = room.enter("a2", Claim("a"))
    assert gone is not None and gone.item == "b2" and ticket.waiting
    ticket, gone = room.enter("low", Claim("c", priority=-1))
    assert gone is ticket
    assert len(room) == 3
    room.leave(ticket)
    assert len(room) == 3


def test_retry_after_grows_with_the_queue_and_its_pace() -> None:
    room: WaitingRoom[str] = WaitingRoom(bound=2_000)
    assert room.retry_after_ms() == MIN_RETRY_MS
    for _ in range(50):
        room.enter("x", Claim())
    short = room.retry_after_ms()
    for at in range(40):
        ticket = room.first()
        assert ticket is not None
        room.grant(ticket, 1.0, at * 2_000.0)
    assert len(room) == 10
    assert room.retry_after_ms() > short
    for _ in range(1_000):
        room.enter("x", Claim())
    assert room.retry_after_ms() == MAX_RETRY_MS


def test_domains_that_are_owed_nothing_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_DOMAINS", 4)
    clock = FairClock()
    for number in range(40):
        clock.charge(str(number), 10.0 + number)
    assert 0 < len(clock) <= 4
    assert clock.start("39") > clock.start("0")


@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "leave", "grant"]), st.integers(-1, 1),
                  st.sampled_from("abc"), st.integers(0, 9)),
        max_size=60,
    ),
    st.integers(1, 5),
)  # fmt: skip
def test_the_room_never_loses_a_ticket(steps: list[tuple[str, int, str, int]], bound: int) -> None:
    room: WaitingRoom[int] = WaitingRoom(bound=bound)
    inside = {}
    for step, priority, domain, pick in steps:
        if step == "enter":
            ticket, gone = room.enter(pick, Claim(domain, priority, float(pick)))
            inside[ticket.number] = ticket
            if gone is not None:
                assert not gone.waiting
                del inside[gone.number]
                assert gone.claim.priority == min(
                    [one.claim.priority for one in [*inside.values(), gone]]
                )
        elif inside and step == "leave":
            room.leave(inside.pop(list(inside)[pick % len(inside)]))
        elif inside:
            first = room.first()
            assert first is not None
            assert first.claim.priority == max(one.claim.priority for one in inside.values())
            room.grant(first, 1.0, 0.0)
            del inside[first.number]
        assert len(room) == len(inside) <= bound
        assert (room.first() is None) == (not inside)


def test_a_flood_that_is_refused_leaves_nothing_behind() -> None:
    room: WaitingRoom[str] = WaitingRoom(bound=8)
    for _ in range(8):
        room.enter("first", Claim(deadline_ms=1_000))
    for _ in range(5_000):
        ticket, victim = room.enter("flood", Claim(deadline_ms=60_000))
        assert victim is ticket
    assert len(room) == 8
    kept = sum(len(queue) for domains in room._queues.values() for queue in domains.values())
    assert kept < 200, "tickets that left are not kept until their time"
    assert served(room, 8) == ["first"] * 8
