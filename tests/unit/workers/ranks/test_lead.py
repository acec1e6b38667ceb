"""Rank 0's side, against a rank that a test plays; what Lead may kill is a process that sleeps."""

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from kvworkers.models.sharding import Part
from kvworkers.models.step import Carried, StepInputs
from kvworkers.ranks.channel import Channel
from kvworkers.ranks.collective import Collective
from kvworkers.ranks.lead import Lead, Member
from kvworkers.ranks.messages import Frame, Kind, copies_of, step_of
from kvworkers.stream.gate import Gate
from torch import Tensor

from kvstore.core.errors import BadInput, Unreachable
from tests.model_fixture import make_step
from tests.patience import PATIENCE_S, until_so


class Alone(Collective):
    """The group of a rank whose others only listen."""

    def __init__(self) -> None:
        super().__init__(Part(0, 2))
        self.sent: list[list[int]] = []

    def from_first(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor.tolist())
        return tensor


@dataclass
class Scene:
    """A lead, the process that stands for rank 1, and the other end of its channel."""

    lead: Lead
    process: "subprocess.Popen[bytes]"
    rank: Channel
    collective: Alone
    over: bool = False
    lost: list[str] = field(default_factory=list)
    told: threading.Event = field(default_factory=threading.Event)

    def on_lost(self, why: str) -> None:
        assert self.process.poll() is not None, "told before the rank was seen to be dead"
        self.lost.append(why)
        self.told.set()

    def hear(self) -> Frame:
        return self.rank.receive(deadline_s=PATIENCE_S)[0]


Make = Callable[[float], Scene]


@pytest.fixture
def make() -> Iterator[Make]:
    scenes: list[Scene] = []

    def one(deadline_s: float) -> Scene:
        mine, theirs = socket.socketpair()
        process = subprocess.Popen(["sleep", "60"])
        channel = Channel(mine, deadline_s=PATIENCE_S)
        member = Member(channel, process.pid, os.pidfd_open(process.pid))
        collective = Alone()
        lead = Lead({1: member}, collective, torch.device("cpu"), deadline_s=deadline_s)
        scene = Scene(lead, process, Channel(theirs, deadline_s=PATIENCE_S), collective)
        lead.start(scene.on_lost)
        scenes.append(scene)
        return scene

    yield one
    for scene in scenes:
        scene.process.kill()
        scene.process.wait(PATIENCE_S)
        if not scene.over:
            scene.lead.close()
        scene.rank.close()


def logits(step: StepInputs) -> Tensor:
    return torch.tensor([float(step.on(torch.device("cpu")).tokens.sum())])


def test_a_step_is_sent_and_computed_here(make: Make) -> None:
    scene = make(30.0)
    step = make_step(([5, 6, 7], 0, [0]))
    assert scene.lead.compute(step, logits).tolist() == [18.0]
    frame = scene.hear()
    assert frame.kind is Kind.STEP and frame.number("number") == 1
    assert step_of(frame).tokens.tolist() == [5, 6, 7]
    assert scene.collective.sent == []
    assert scene.lead.pids == (scene.process.pid,)


def test_tokens_that_the_host_has_not_seen_go_as_a_tensor(make: Make) -> None:
    scene = make(30.0)
    before = Carried(torch.tensor([90, 91]), torch.tensor([1, -1]))
    step = replace(make_step(([0], 4, [0]), ([8], 2, [1])), carried=before)
    assert scene.lead.compute(step, logits).tolist() == [99.0]
    assert scene.collective.sent == [[91, 8]]
    assert scene.hear().facts["carried"] is True


def test_a_step_that_is_too_long_for_a_frame_ends_nobody(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make(30.0)
    monkeypatch.setattr("kvworkers.ranks.messages.MAX_ARRAY_BYTES", 200)
    with pytest.raises(BadInput, match="bytes between ranks"):
        scene.lead.compute(make_step((list(range(30)), 0, [0, 1])), logits)
    assert scene.lead.compute(make_step(([5], 0, [0])), logits).tolist() == [5.0]
    assert scene.hear().kind is Kind.STEP and not scene.lost


def test_a_step_behind_a_load_is_sent_when_every_rank_has_loaded(make: Make) -> None:
    scene = make(0.2)
    gate = Gate(2, changed=lambda: None)
    step = replace(make_step(([5], 16, [0, 1])), gates=(gate,))
    computing = threading.Thread(target=scene.lead.compute, args=(step, logits))
    computing.start()
    with pytest.raises(Unreachable, match="said nothing"):
        scene.rank.receive(deadline_s=0.4)
    scene.lead._deadline_s = PATIENCE_S  # for the step itself
    gate.come()
    assert scene.hear().number("number") == 1
    computing.join(PATIENCE_S)
    assert scene.lost == [], "waiting for a load is no step of a rank"
    scene.rank.send(Frame(Kind.STEPPED, {"number": 1}))


def test_pages_are_copied_by_all_between_two_steps(make: Make) -> None:
    scene, mine = make(0.2), list[list[tuple[int, int]]]()
    scene.lead.compute(make_step(([5], 0, [0])), logits)
    scene.lead.copy([(3, 8), (3, 9)], lambda copies: mine.append(list(copies)))
    scene.lead.compute(make_step(([6], 1, [0])), logits)
    frames = [scene.hear() for _ in range(3)]
    assert [frame.kind for frame in frames] == [Kind.STEP, Kind.COPY, Kind.STEP]
    assert [frame.number("number") for frame in frames] == [1, 2, 3]
    assert copies_of(frames[1]) == [(3, 8), (3, 9)] and mine == [[(3, 8), (3, 9)]]
    scene.rank.send(Frame(Kind.STEPPED, {"number": 1}))
    assert scene.told.wait(5) and "step 2" in scene.lost[0], "its end is waited for as a step's"


def test_a_rank_that_cannot_be_told_to_copy_is_lost(make: Make) -> None:
    scene = make(30.0)
    with pytest.raises(RuntimeError):
        scene.lead.copy([(0, 1)], broken)
    assert scene.lost == ["rank 0 failed in a copy: RuntimeError: a bug"]


def broken(copies: object) -> None:
    raise RuntimeError("a bug")


def test_a_copy_ends_when_every_rank_has_copied(make: Make) -> None:
    scene = make(30.0)
    first = scene.lead.move(store=True, alone=False, raw=False, offsets=[4096], pages=[3])
    second = scene.lead.move(store=False, alone=True, raw=False, offsets=[0], pages=[1])
    frames = [scene.hear(), scene.hear()]
    assert [f.facts["store"] for f in frames] == [True, False]
    assert not first.done() and not second.done()
    scene.rank.send(Frame(Kind.MOVED, {"job": frames[1].number("job"), "error": ""}))
    second.result(PATIENCE_S)
    error = "pages reach from 3 to 3"
    scene.rank.send(Frame(Kind.MOVED, {"job": frames[0].number("job"), "error": error}))
    with pytest.raises(Unreachable, match=error):
        first.result(PATIENCE_S)
    assert not scene.lost and scene.process.poll() is None, "a copy may fail, and all go on"


def test_the_arena_is_reached_when_every_rank_has_mapped_the_newest(make: Make) -> None:
    scene = make(30.0)
    heard = threading.Event()
    take = scene.lead._take

    def noted(rank: int, member: Member, frame: Frame) -> None:
        take(rank, member, frame)
        heard.set()

    scene.lead._take = noted  # type: ignore[method-assign]
    read, write = os.pipe()
    for number, said, reached in ((1, 1, 100), (2, 1, 0), (2, 2, 70)):
        if number > scene.lead._arena:
            scene.lead.map(read)
            frame, descriptor = scene.rank.receive(deadline_s=PATIENCE_S)
            assert frame.number("arena") == number and descriptor is not None
            os.close(descriptor)
        heard.clear()
        scene.rank.send(Frame(Kind.REACHED, {"arena": said, "bytes": 100 if said == 1 else 70}))
        assert heard.wait(PATIENCE_S)
        assert scene.lead.reached_bytes == reached
    os.close(read)
    os.close(write)


def test_a_rank_that_does_not_step_in_time_is_the_end(make: Make) -> None:
    scene = make(PATIENCE_S)
    scene.lead.compute(make_step(([5], 0, [0])), logits)
    scene.rank.send(Frame(Kind.STEPPED, {"number": 1}))
    until_so(lambda: not scene.lead._begun)
    scene.lead._deadline_s = 0.1
    assert not scene.told.wait(0.3), "it was in time"
    scene.lead.compute(make_step(([6], 0, [0])), logits)
    copying = scene.lead.move(store=True, alone=False, raw=False, offsets=[0], pages=[0])
    assert scene.told.wait(PATIENCE_S)
    assert scene.lost == ["a rank has not done step 2 in 0.1 s"]
    with pytest.raises(Unreachable, match="step 2"):
        copying.result(PATIENCE_S)
    with pytest.raises(Unreachable, match="step 2"):
        scene.lead.compute(make_step(([7], 0, [0])), logits)
    with pytest.raises(Unreachable, match="step 2"):
        scene.lead.move(store=True, alone=False, raw=False, offsets=[0], pages=[0])
    assert scene.lead.reached_bytes == 0


def test_a_copy_that_does_not_end_in_time_is_the_end(make: Make) -> None:
    scene = make(0.1)
    copying = scene.lead.move(store=True, alone=False, raw=False, offsets=[0], pages=[0])
    with pytest.raises(Unreachable, match="has not done a copy in"):
        copying.result(PATIENCE_S)
    assert scene.lost and scene.process.poll() is not None


@pytest.mark.parametrize("end", ["hangs up", "failed", "babbles"])
def test_a_rank_that_ends_is_the_end(make: Make, end: str) -> None:
    scene = make(30.0)
    if end == "hangs up":
        scene.rank.close()
    elif end == "failed":
        scene.rank.send(Frame(Kind.FAILED, {"why": "out of memory"}))
    else:
        scene.rank.send(Frame(Kind.GO))
    assert scene.told.wait(PATIENCE_S)
    said = {"hangs up": "has ended", "failed": "out of memory", "babbles": "a rank said go"}[end]
    assert scene.lost[0].startswith("rank 1: ") and said in scene.lost[0]


def test_a_step_that_fails_here_leaves_the_others_in_the_middle(make: Make) -> None:
    scene = make(30.0)

    def fails(step: StepInputs) -> Tensor:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        scene.lead.compute(make_step(([5], 0, [0])), fails)
    assert scene.told.wait(PATIENCE_S)
    assert "rank 0 failed in a step: RuntimeError: no memory" in scene.lost


def test_an_end_in_good_order_is_no_loss(make: Make) -> None:
    scene = make(30.0)
    ended = threading.Thread(target=scene.lead.close)
    ended.start()
    assert scene.hear().kind is Kind.END
    scene.process.kill()  # as a rank ends that was told so
    ended.join(PATIENCE_S)
    assert not ended.is_alive() and scene.lost == []
    scene.over = True
