"""Ends every process of a cluster, whenever and however it has to end.

The supervisor imports nothing heavy, so Ctrl-C finds it ready from the first moment. It runs
the *session* (the process that drives Ray) in a Unix session of its own, so the terminal's Ctrl-C
reaches the supervisor alone; and it is a subreaper, so whatever loses its parent becomes its child
and can be found, told to end, and killed by process id.

    terminal ─ Ctrl-C ─▶ supervisor ─ SIGTERM ─▶ session ─▶ Ray ─▶ actors ─▶ keeper ─▶ node
"""

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from kvstore.core.errors import Unreachable

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36

GRACE_SECONDS: Final = 25.0
"""How long the session may take to end in good order after it was told."""

_TERM_SECONDS: Final = 3.0
"""How long leftovers may take after SIGTERM before SIGKILL."""

_KILL_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.05
_QUIET_LOOKS: Final = 3
"""Looks in a row that have to find nothing: one alone may miss a process that changes parents."""

_MAX_READY_BYTES: Final = 64 << 10

EXIT_INTERRUPTED: Final = 130
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a session ended. `interrupted`: it was told to, by a signal to the supervisor."""

    status: int
    interrupted: bool
    leftovers: int
    """Processes that outlived the session and had to be ended one by one."""


def supervise(
    command: Sequence[str],
    *,
    on_ready: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> Ended:
    """Run `command` as a session until it ends or a signal ends it; leave no process behind.

    The session gets `--ready-fd N` appended and may write one line of JSON there when it is
    ready, which is handed to `on_ready`. A second signal does not wait for good order.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with _signals() as wakeup, selectors.DefaultSelector() as selector:
        selector.register(wakeup, selectors.EVENT_READ, "signal")
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        try:
            session = subprocess.Popen(
                [*command, "--ready-fd", str(ready_write)],
                start_new_session=True,
                pass_fds=(ready_write,),
                stdin=subprocess.DEVNULL,
            )
        finally:
            os.close(ready_write)
        selector.register(ready_read, selectors.EVENT_READ, "ready")
        try:
            interrupted = _follow(session, selector, wakeup, on_ready)
        finally:
            os.close(ready_read)
            leftovers = end_descendants()
    status = session.returncode
    return Ended(status if status is not None else 1, interrupted, leftovers)


def _follow(
    session: "subprocess.Popen[bytes]",
    selector: selectors.BaseSelector,
    wakeup: int,
    on_ready: Callable[[dict[str, Any]], None],
) -> bool:
    """Wait until the session has ended; return whether a signal was the reason."""
    told = 0
    deadline: float | None = None
    while session.poll() is None:
        rest = None if deadline is None else max(0.0, deadline - time.monotonic())
        events = selector.select(rest)
        if deadline is not None and time.monotonic() >= deadline:
            session.kill()
            session.wait(_KILL_SECONDS)
        for key, _ in events:
            if key.data == "ready":
                selector.unregister(key.fileobj)
                _hear_ready(key.fd, on_ready)
            elif asked := times_asked_to_end(os.read(wakeup, 64)):
                told += asked
                deadline = time.monotonic() + (GRACE_SECONDS if told == 1 else 0.0)
                session.send_signal(signal.SIGTERM)
        _reap(session.pid)
    return told > 0


def times_asked_to_end(numbers: bytes) -> int:
    """Return how many of the signals that the wakeup pipe named end us."""
    return sum(number in _SIGNALS for number in numbers)


def _hear_ready(source: int, on_ready: Callable[[dict[str, Any]], None]) -> None:
    line = os.read(source, _MAX_READY_BYTES)
    if line:
        on_ready(json.loads(line))


@contextmanager
def _signals() -> Iterator[int]:
    """Turn signals into bytes on a pipe, so that none is lost between two instructions."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    handled = (*_SIGNALS, signal.SIGCHLD)
    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


def descendants(root: int) -> list[int]:
    """Return the ids of all living processes below `root`, by the kernel's list of parents.

    One look is not a snapshot: a process whose parent ends while we read may be missed once.
    """
    children: dict[int, list[int]] = {}
    ended: set[int] = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
            # The command may hold spaces and brackets: fields start after the last bracket.
            state, parent = file.read().rpartition(b")")[2].split()[:2]
            children.setdefault(int(parent), []).append(int(entry))
            if state in (b"Z", b"X"):
                ended.add(int(entry))
    found: list[int] = []
    pending = [root]
    while pending:
        below = children.get(pending.pop(), [])
        found += [pid for pid in below if pid not in ended]
        pending += below
    return found


def end_descendants() -> int:
    """End every process below this one; return how many had to be.

    Politely first, then by SIGKILL, over and over: a process may start another while it ends.
    Raises `Unreachable` when some survive even that (an uninterruptible device).
    """
    started = time.monotonic()
    told: set[int] = set()
    quiet = 0
    while time.monotonic() < started + _TERM_SECONDS + _KILL_SECONDS:
        _reap()
        living = descendants(os.getpid())
        quiet = 0 if living else quiet + 1
        if quiet == _QUIET_LOOKS:
            return len(told)
        polite = time.monotonic() < started + _TERM_SECONDS
        for pid in living:
            if pid not in told or not polite:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM if polite else signal.SIGKILL)
        told.update(living)
        time.sleep(_POLL_SECONDS)  # bounded poll: grandchildren cannot be waited on
    raise Unreachable(f"processes would not end: {descendants(os.getpid())}")


def _reap(keep: int = 0) -> None:
    """Take the exit status of children that have ended, adopted ones too; leave that of `keep`."""
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == keep:
                return  # its owner takes it, and the rest come in the next round
            os.waitpid(ended.si_pid, 0)


def die_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent ends, however that comes."""
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def session_command(module: str, *arguments: str) -> list[str]:
    """Return the command line of a session that is the module `module`."""
    return [sys.executable, "-m", module, *arguments]


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
