"""Rank 0's hold on the others: has them compute and copy what it does, and sees when one is lost.

A rank that ends, or has not done within the deadline what it was told, is the end of all: what the
others hold is of no use without its heads. They are killed and seen to be dead before anybody is
told, for a slot that one of them may still write must not be given back.
"""

import logging
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from kvstore.core.errors import BadInput, Unreachable
from kvworkers.models.loading import Copies
from kvworkers.models.step import Carried, StepInputs, on_device
from kvworkers.ranks.channel import Channel
from kvworkers.ranks.collective import Collective
from kvworkers.ranks.messages import Frame, Kind, copy_frame, move_frame, step_frame

_log = logging.getLogger(__name__)

_DEATH_S: Final = 10.0
"""How long a killed rank may take to be gone; one on a device that hangs may take for ever."""
_LOOK_S: Final = 0.5


@dataclass(slots=True)
class Member:
    """Another rank, as rank 0 knows it."""

    channel: Channel
    pid: int
    pidfd: int
    stepped: int = 0
    """The last step that it has done."""
    reached: tuple[int, int] = (0, 0)
    """The last arena that it has mapped, and how many bytes of it copies can use."""


@dataclass(slots=True)
class _Job:
    begun_s: float
    waits: set[int]
    done: "Future[None]" = field(default_factory=Future)
    error: str = ""


class Lead:
    """The other ranks of one worker. `compute` is for one thread; the rest for any."""

    def __init__(
        self,
        members: Mapping[int, Member],
        collective: Collective,
        device: torch.device,
        *,
        deadline_s: float,
    ) -> None:
        """`members` are loaded, have joined, and are ready."""
        self.why_lost = ""
        """Why it is over; "" as long as all ranks are there."""
        self._members = dict(members)
        self._collective = collective
        self._device = device
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._number = 0
        self._begun: deque[tuple[int, float]] = deque()
        self._jobs: dict[int, _Job] = {}
        self._last_job = 0
        self._arena = 0
        self._on_lost: Callable[[str], object] = _nobody
        self._threads: list[threading.Thread] = []

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes of the other ranks."""
        return tuple(member.pid for member in self._members.values())

    def start(self, on_lost: Callable[[str], object]) -> None:
        """Listen to the ranks; `on_lost` is told once, on a thread of its own, why it is over."""
        self._on_lost = on_lost
        loops: list[Callable[[], None]] = [partial(self._hear, rank) for rank in self._members]
        for loop in [*loops, self._watch]:
            thread = threading.Thread(target=loop, name="ranks", daemon=True)
            self._threads.append(thread)
            thread.start()

    def compute(self, step: StepInputs, mine: Callable[[StepInputs], Tensor]) -> Tensor:
        """Send a step to all ranks and compute this one's part: `mine` of it.

        One that follows a load waits for it first: the others have no gate to wait at.
        """
        step.pass_layer(0)  # A load of several ranks brings all layers at once.
        frame = self._next(lambda number: step_frame(number, step))
        try:
            self._tell(frame)
            if step.carried is not None:
                # What the step before chose has never been on the host: it goes as a tensor.
                chosen = step.carried.into(on_device(step.tokens, self._device))
                self._collective.from_first(chosen)
                step = replace(step, carried=Carried(chosen, torch.arange(chosen.shape[0])))
            return mine(step)
        except BaseException as error:
            # The others are at some place of this step: nothing can be computed with them again.
            self._lose(f"rank 0 failed in a step: {type(error).__name__}: {error}")
            raise

    def copy(self, copies: Copies, mine: Callable[[Copies], None]) -> None:
        """Have all ranks copy pages between this step and the next; `mine` does it here."""
        frame = self._next(lambda number: copy_frame(number, copies))
        try:
            self._tell(frame)
            mine(copies)
        except BaseException as error:
            self._lose(f"rank 0 failed in a copy: {type(error).__name__}: {error}")
            raise

    def _next(self, framed: Callable[[int], Frame]) -> Frame:
        """Return the frame of what is begun next, whose end is waited for from now on."""
        with self._lock:
            self._check()
            self._number += 1
            frame = framed(self._number)  # Raises for one that is too large: nothing is lost.
            self._begun.append((self._number, time.monotonic()))
        return frame

    def move(
        self,
        *,
        store: bool,
        alone: bool,
        raw: bool,
        offsets: Sequence[int],
        pages: Sequence[int],
    ) -> "Future[None]":
        """Have every other rank copy its part of these blocks.

        The future ends when all have, with `Unreachable` when one could not; none goes on then.
        """
        with self._lock:
            self._check()
            self._last_job += 1
            number = self._last_job
            job = self._jobs[number] = _Job(time.monotonic(), set(self._members))
        frame = move_frame(number, store=store, alone=alone, raw=raw, offsets=offsets, pages=pages)
        self._tell_or_lose(frame)
        return job.done

    def map(self, descriptor: int) -> None:
        """Give every rank the arena to map that copies go to from now on."""
        with self._lock:
            self._arena += 1
            number = self._arena
        self._tell_or_lose(Frame(Kind.MAP, {"arena": number}), descriptor)

    @property
    def reached_bytes(self) -> int:
        """Bytes of the arena mapped last, from its start, that copies of every rank can use."""
        with self._lock:
            found = [m.reached[1] if m.reached[0] == self._arena else 0 for m in self._others()]
        return min(found, default=0) if not self.why_lost else 0

    def close(self) -> None:
        """Let the ranks go; those that do not end in time are killed."""
        self._ending.set()
        if not self.why_lost:
            with suppress(Unreachable):
                self._tell(Frame(Kind.END))
        if not _wait_for_death(self._others(), _DEATH_S):
            self._kill()
        if not self.why_lost:  # Else it may wait for those that are dead.
            self._collective.leave()
        for member in self._others():
            member.channel.close()
            os.close(member.pidfd)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_DEATH_S)

    def _others(self) -> list[Member]:
        return list(self._members.values())

    def _check(self) -> None:
        if self.why_lost:
            raise Unreachable(self.why_lost)

    def _tell(self, frame: Frame, descriptor: int | None = None) -> None:
        for member in self._others():
            member.channel.send(frame, descriptor)

    def _tell_or_lose(self, frame: Frame, descriptor: int | None = None) -> None:
        try:
            self._tell(frame, descriptor)
        except Unreachable as error:
            # On another thread: this one may be the event loop's, and killing takes a while.
            threading.Thread(target=self._lose, args=(str(error),), daemon=True).start()

    def _hear(self, rank: int) -> None:
        member = self._members[rank]
        try:
            while True:
                frame, descriptor = member.channel.receive()
                if descriptor is not None:
                    os.close(descriptor)
                self._take(rank, member, frame)
        except (Unreachable, BadInput) as error:
            if not self._ending.is_set():
                self._lose(f"rank {rank}: {error}")

    def _take(self, rank: int, member: Member, frame: Frame) -> None:
        if frame.kind is Kind.STEPPED:
            with self._lock:
                member.stepped = frame.number("number")
                least = min(other.stepped for other in self._others())
                while self._begun and self._begun[0][0] <= least:
                    self._begun.popleft()
        elif frame.kind is Kind.MOVED:
            self._moved(rank, frame.number("job"), str(frame.facts.get("error") or ""))
        elif frame.kind is Kind.REACHED:
            with self._lock:
                member.reached = (frame.number("arena"), frame.number("bytes"))
        elif frame.kind is Kind.FAILED:
            raise Unreachable(str(frame.facts.get("why")))
        else:
            raise BadInput(f"a rank said {frame.kind}")

    def _moved(self, rank: int, number: int, error: str) -> None:
        with self._lock:
            job = self._jobs.get(number)
            if job is None:
                return
            job.waits.discard(rank)
            job.error = job.error or error
            if job.waits:
                return
            del self._jobs[number]
        if job.error:
            job.done.set_exception(Unreachable(f"a rank could not copy: {job.error}"))
        else:
            job.done.set_result(None)

    def _watch(self) -> None:
        """See that nothing takes longer than the deadline."""
        while not self._ending.wait(min(_LOOK_S, self._deadline_s / 4)):
            begun = time.monotonic() - self._deadline_s
            with self._lock:
                late = [m.stepped for m in self._others()] if self._begun else []
                slow = bool(late) and self._begun[0][1] < begun
                stuck = any(job.begun_s < begun for job in self._jobs.values())
            if slow or stuck:
                what = f"step {min(late) + 1}" if slow else "a copy"
                self._lose(f"a rank has not done {what} in {self._deadline_s:g} s")
                return

    def _lose(self, why: str) -> None:
        with self._lock:
            if self.why_lost or self._ending.is_set():
                return
            self.why_lost = why
        _log.error("the ranks are lost: %s", why)
        dead = self._kill()
        self._on_lost(why)
        if not dead:
            return  # Who waits for copies goes on waiting: they may still be written.
        with self._lock:
            jobs, self._jobs = list(self._jobs.values()), {}
        for job in jobs:
            job.done.set_exception(Unreachable(why))

    def _kill(self) -> bool:
        """Kill every rank; say whether all are seen to be dead."""
        for member in self._others():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(member.pidfd, signal.SIGKILL)
        return _wait_for_death(self._others(), _DEATH_S)


def _wait_for_death(members: Sequence[Member], seconds: float) -> bool:
    ends = time.monotonic() + seconds
    for member in members:
        left = max(0.0, ends - time.monotonic())
        if not select.select([member.pidfd], [], [], left)[0]:
            return False
    return True


def _nobody(why: str) -> None:
    """Stand in for who is told of a loss."""
