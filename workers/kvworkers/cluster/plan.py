"""What the controller should do next: pure decisions over what the parts last reported.

A *part* is a process that the controller keeps alive: one cache node per host, one worker per
device, the frontends. Each is a Ray actor that starts empty; the controller hands it an
incarnation and its orders, again after every restart:

    empty ──Start──▶ starting ──▶ serving ──(process dies, Ray restarts the actor)──▶ empty
                        └──▶ failed ──Start, after a pause──▶ starting
    no answer for HUNG_AFTER_MS ──Restart──▶ empty
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

HUNG_AFTER_MS: Final = 30_000
"""A part silent this long is restarted. Importing torch on two busy cores blocked for 8 s."""

RETRY_AFTER_MS: Final = 2_000
"""The pause before a part that failed to start is told to start again."""

MAX_FAILED_STARTS: Final = 3
"""Starts that may fail in a row before the cluster gives up on the part and says why."""


class Role(StrEnum):
    """What a part does, in the order in which parts start."""

    NODE = "node"
    WORKER = "worker"
    FRONTEND = "frontend"


class Phase(StrEnum):
    """Where a part stands in its life."""

    EMPTY = "empty"
    STARTING = "starting"
    SERVING = "serving"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a part says of itself. `address` is its gRPC address, `http` a frontend's other one.
    `ray_node` is where Ray put it; `host` is our name of that host, once it was told.
    `members_version` is the newest member list that a frontend has, and `usable` says whether
    it has a worker to send requests to.
    """

    name: str
    role: Role
    phase: Phase
    ray_node: str = ""
    host: str = ""
    incarnation: int = 0
    address: str = ""
    http: str = ""
    model: str = ""
    metrics: str = ""
    pid: int = 0
    members_version: int = 0
    usable: bool = True
    detail: str = ""


@dataclass(slots=True, kw_only=True)
class Part:
    """What the controller remembers of one part."""

    name: str
    role: Role
    report: Report | None = None
    heard_ms: int = 0
    failed_starts: int = 0
    told_ms: int = 0
    restarts: int = 0
    leaving: bool = False
    """Being drained: nobody is sent there, and it is not started again."""

    def hear(self, report: Report, *, now_ms: int) -> None:
        """Take in a report."""
        before = self.report
        self.heard_ms = now_ms
        self.report = report
        if report.phase is Phase.SERVING:
            self.failed_starts = 0
        elif report.phase is Phase.FAILED and (before is None or before.phase is not Phase.FAILED):
            self.failed_starts += 1
        elif report.phase is Phase.EMPTY and before is not None and before.phase is not Phase.EMPTY:
            self.restarts += 1

    def lose(self) -> None:
        """Take note that the process is gone: nobody is sent there until it reports again."""
        if self.report is not None and self.report.phase is not Phase.EMPTY:
            self.report = replace(self.report, phase=Phase.STARTING, detail="restarting")


@dataclass(frozen=True, slots=True)
class Start:
    """Tell an empty or failed part to serve, as this incarnation."""

    name: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Restart:
    """End a part that no longer answers; Ray brings it back empty."""

    name: str


@dataclass(frozen=True, slots=True)
class Push:
    """Give a frontend, or a node that lends to the others, the member list."""

    name: str


Action = Start | Restart | Push


@dataclass(frozen=True, slots=True)
class MemberList:
    """Who serves, in a stable order; equal lists have equal content."""

    members: tuple[Report, ...] = ()
    version: int = field(default=0, compare=False)


def next_members(current: MemberList, parts: Iterable[Part]) -> MemberList:
    """Return `current`, or its successor where the serving nodes and workers have changed."""
    serving = sorted(
        (
            # What a node knows of the list is no part of the list: it would never come to rest.
            replace(part.report, members_version=0)
            for part in parts
            if part.report is not None
            and part.report.phase is Phase.SERVING
            and part.role is not Role.FRONTEND
            and not part.leaving
        ),
        key=lambda report: (report.role.value, report.name),
    )
    changed = MemberList(tuple(serving), current.version + 1)
    return current if changed == current else changed


def next_incarnation(part: Part, *, now_ms: int) -> int:
    """Return a number above every earlier one of this part.

    Taken from the clock, so that it grows even where controller and part died together.
    """
    last = part.report.incarnation if part.report is not None else 0
    return max(now_ms, last + 1)


def next_actions(
    parts: Mapping[str, Part], members: MemberList, *, now_ms: int
) -> Sequence[Action]:
    """Return what to do now, in order. Doing an action twice does no harm."""
    actions: list[Action] = []
    for part in parts.values():
        report = part.report
        if part.leaving:
            continue
        if now_ms - part.heard_ms > HUNG_AFTER_MS:
            actions.append(Restart(part.name))
            continue
        if report is None:
            continue
        due = report.phase is Phase.EMPTY or (
            report.phase is Phase.FAILED
            and part.failed_starts < MAX_FAILED_STARTS
            and now_ms - part.told_ms >= RETRY_AFTER_MS
        )
        if due:
            actions.append(Start(part.name, next_incarnation(part, now_ms=now_ms)))
        elif (
            part.role in (Role.FRONTEND, Role.NODE)
            and report.phase is Phase.SERVING
            and report.members_version != members.version
        ):
            actions.append(Push(part.name))
    return actions


def hopeless(parts: Iterable[Part]) -> str:
    """Return why the cluster cannot come up, or nothing while it still may."""
    for part in parts:
        if part.report is not None and part.failed_starts >= MAX_FAILED_STARTS:
            return f"{part.name}: {part.report.detail}"
    return ""


def ready(parts: Iterable[Part], members: MemberList) -> bool:
    """Say whether every part serves and every frontend knows the newest members."""
    return all(
        part.report is not None
        and part.report.phase is Phase.SERVING
        and part.report.usable
        and (part.role is not Role.FRONTEND or part.report.members_version == members.version)
        for part in parts
        if not part.leaving
    )


def heard_of(parts: Iterable[Part], members: MemberList) -> bool:
    """Say whether every frontend that serves knows the newest members."""
    return all(
        part.report.members_version == members.version
        for part in parts
        if part.role is Role.FRONTEND
        and part.report is not None
        and part.report.phase is Phase.SERVING
    )
