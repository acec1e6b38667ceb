"""The note that a running cluster leaves for `down` and `chat`: who runs it and where it is."""

import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

from kvstore.core.errors import BadInput, NotFound

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One running cluster. `started` is the supervisor's start in kernel ticks since boot.

    A process id alone may have been given to a stranger since; with its start it is unique.
    """

    name: str
    pid: int
    started: int
    run_dir: str
    log: str = ""
    http: str = ""
    grpc: str = ""
    model: str = ""
    parts: list[dict[str, str | int]] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        return bool(self.http)

    def alive(self) -> bool:
        """Say whether the very process that wrote this still runs."""
        return started_ticks(self.pid) == self.started

    def with_endpoints(
        self, *, http: str, grpc: str, model: str, parts: list[dict[str, str | int]]
    ) -> "State":
        """Return the state of the same cluster once it is ready."""
        return replace(self, http=http, grpc=grpc, model=model, parts=parts)


def started_ticks(pid: int) -> int:
    """Return when a process started, in ticks since boot; 0 when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    # Field 22 of proc(5); the two before the bracket are gone. A zombie has ended.
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


class StateFile:
    """The state of the cluster called `name` in one user's directory."""

    def __init__(self, directory: Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise BadInput(f"--name {name!r}: lower-case letters, digits and dashes, at most 32")
        self.name = name
        self.path = directory / f"up-{name}.json"

    def read(self) -> State | None:
        """Return what is noted, or nothing; a note that cannot be read counts as stale."""
        try:
            return State(**json.loads(self.path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            self.path.unlink(missing_ok=True)
            return None

    def running(self) -> State:
        """Return the state of the running cluster.

        Raises `NotFound` where none runs; a note left by one that was killed is removed.
        """
        state = self.read()
        if state is not None and state.alive():
            return state
        self.path.unlink(missing_ok=True)
        raise NotFound(f"no cluster named {self.name!r} is running")

    def claim(self, run_dir: Path, log: str = "") -> State:
        """Note that this process runs the cluster.

        Raises `BadInput` where another process does.
        """
        state = State(
            name=self.name,
            pid=os.getpid(),
            started=started_ticks(os.getpid()),
            run_dir=str(run_dir),
            log=log,
        )
        while True:
            if (other := self.read()) is not None and other.alive():
                raise BadInput(
                    f"--name {self.name}: a cluster of that name already runs "
                    f"(process {other.pid}); end it with `kvstore down --name {self.name}`"
                )
            self.path.unlink(missing_ok=True)
            try:
                self._create(state)
            except FileExistsError:
                continue  # another claim came first: look at it
            return state

    def write(self, state: State) -> None:
        """Replace the note as a whole."""
        temporary = self.path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(state)))
        temporary.replace(self.path)

    def drop(self, state: State) -> None:
        """Remove the note if it is still that of `state`."""
        current = self.read()
        if current is not None and (current.pid, current.started) == (state.pid, state.started):
            self.path.unlink(missing_ok=True)

    def _create(self, state: State) -> None:
        """Make the file with its content at once, or raise `FileExistsError`."""
        temporary = self.path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(state)))
        try:
            os.link(temporary, self.path)
        finally:
            temporary.unlink()
