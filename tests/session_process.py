"""A client in a process of its own, to be stopped and killed: reads commands, prints answers.

Run as `python tests/session_process.py RUN_DIR NAMESPACE`; a command is a line of JSON
`{"do": NAME, …}` and each gets one line of JSON back.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvstore.client import Client, ClientConfig
from kvstore.client.replies import Acquired
from kvstore.core.names import BlockName, Namespace, chain, pack_tokens
from tests.patience import PATIENCE_S, PATIENT
from tests.processes import REPOSITORY

PAYLOAD = 64 << 10
SHARES = 2


def namespace(label: str) -> Namespace:
    """Return a namespace of its own for each test."""
    return Namespace(weights_digest=label, kv_dtype="float32", layers=1, kv_heads=2, head_dim=64)


def connect(run_dir: Path, label: str, config: ClientConfig = PATIENT) -> Client:
    """Open a session the way every test and the process below do."""
    return Client.connect(
        run_dir,
        namespace=namespace(label),
        payload_bytes=PAYLOAD,
        shares=SHARES,
        config=config,
        name=label[:40],
    )


def names_of(client: Client, prompt: int, count: int) -> list[BlockName]:
    """Return the names of the first `count` blocks of a made-up prompt."""
    return list(chain(client.root, pack_tokens([prompt] * 16 * count)))


class Commands:
    """What the process does when told to."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._acquired: Acquired | None = None

    def acquire(self, prompt: int, count: int, reserve: int) -> dict[str, Any]:
        """Acquire and keep what was given."""
        names = names_of(self._client, prompt, count)
        self._acquired = self._client.acquire(names, reserve=reserve)
        return {"ready": len(self._acquired.ready), "reserved": len(self._acquired.reserved)}

    def write(self, value: int) -> dict[str, Any]:
        """Fill every reserved slot with one byte value."""
        assert self._acquired is not None
        for item in self._acquired.reserved:
            view = self._client.view(item.slot)
            view[:] = bytes([value]) * len(view)
        return {}

    def commit(self) -> dict[str, Any]:
        """Commit every reserved slot."""
        assert self._acquired is not None
        slots = [item.slot for item in self._acquired.reserved]
        settled = self._client.settle(commit=slots)
        return {"outcomes": [outcome.name for outcome in settled.commit]}

    def copy(self) -> dict[str, Any]:
        """Copy every leased block; say for each what was in it and whether to believe it."""
        assert self._acquired is not None
        blocks = []
        for ref in self._acquired.ready:
            block = bytes(self._client.view(ref)[:PAYLOAD])
            blocks.append({"bytes": sorted(set(block)), "still": self._client.still(ref)})
        return {"blocks": blocks}


def main() -> None:
    run_dir, label = sys.argv[1:]
    with connect(Path(run_dir), label) as client:
        commands = Commands(client)
        _say({"ready": True})
        for line in sys.stdin:
            arguments = json.loads(line)
            _say(getattr(commands, arguments.pop("do"))(**arguments))


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


class SessionProcess:
    """The test's end."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def tell(self, do: str, **arguments: int) -> None:
        """Send a command and do not wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Read the next answer."""
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def ask(self, do: str, **arguments: int) -> dict[str, Any]:
        """Send a command and return its answer."""
        self.tell(do, **arguments)
        return self.answer()


@contextmanager
def session_process(run_dir: Path, label: str) -> Iterator[SessionProcess]:
    """Run the process until the block ends; it is ready when the block begins."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.session_process", str(run_dir), label],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    try:
        session = SessionProcess(process)
        assert session.answer() == {"ready": True}
        yield session
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


if __name__ == "__main__":
    main()
