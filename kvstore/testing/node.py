"""A real keeper and cache node for a test, in processes of their own.

    with start_node(arena_bytes=64 << 20) as node:
        client = Client.connect(node.run_dir, …)
        node.kill_node()

Nothing is left behind: leaving the block ends the keeper, which ends its node; if the test process
dies first, the keeper sees that too.
"""

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import kvstore
from kvstore.core.errors import KvStoreError, Unreachable

_POLL_S: Final = 0.01
_LOG_TAIL_BYTES: Final = 8_192
_STOP_S: Final = 30.0


class RunningNode:
    """A keeper that this process started. A context manager; `start_node` makes it."""

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        run_dir: Path,
        log: Path,
        *,
        remove: bool,
        facts: dict[str, Any],
    ) -> None:
        self.run_dir = run_dir
        """What `Client.connect` wants."""
        self.log = log
        """Standard error of keeper and node."""
        self._process = process
        self._remove = remove
        self._facts = facts

    @property
    def name(self) -> str:
        """The node's name."""
        return str(self._facts["name"])

    @property
    def keeper_pid(self) -> int:
        """Process id of the keeper."""
        return self._process.pid

    @property
    def node_pid(self) -> int:
        """Process id of the cache node that was ready last."""
        return int(self.facts()["node_pid"])

    @property
    def incarnation(self) -> int:
        """Incarnation of the cache node that was ready last."""
        return int(self.facts()["incarnation"])

    @property
    def rpc(self) -> str:
        """gRPC address on the Unix socket."""
        return str(self._facts["rpc"])

    @property
    def listen(self) -> str:
        """gRPC address on TCP; stays across restarts of the node."""
        return str(self._facts["listen"])

    @property
    def bulk(self) -> str:
        """`host:port` of the bulk port."""
        return str(self._facts["bulk"])

    @property
    def metrics(self) -> str:
        """`host:port` of the metrics page."""
        return str(self._facts["metrics"])

    def facts(self) -> dict[str, Any]:
        """Return what the keeper published when the node was ready last."""
        with contextlib.suppress(FileNotFoundError):
            self._facts = json.loads((self.run_dir / "node.json").read_text())
        return self._facts

    def kill_node(self) -> int:
        """End the cache node with SIGKILL; return its incarnation, for `wait_restarted`."""
        facts = self.facts()
        os.kill(int(facts["node_pid"]), signal.SIGKILL)
        return int(facts["incarnation"])

    def signal_node(self, number: signal.Signals) -> None:
        """Send a signal to the cache node: SIGSTOP makes it hang, SIGCONT goes on."""
        os.kill(self.node_pid, number)

    def wait_restarted(self, incarnation: int, *, deadline_s: float = 120.0) -> int:
        """Wait until a node later than `incarnation` is ready; return its incarnation."""
        ends = time.monotonic() + deadline_s
        while self.incarnation <= incarnation:
            if self._process.poll() is not None:
                raise Unreachable(f"the keeper ended by itself\n{self.log_tail()}")
            if time.monotonic() > ends:
                raise Unreachable(f"no node after {deadline_s} s\n{self.log_tail()}")
            time.sleep(_POLL_S)
        return self.incarnation

    def kill_keeper(self) -> None:
        """End the keeper with SIGKILL and wait until it and its node are gone."""
        node_pid = self.node_pid
        self._process.kill()
        self._process.wait(_STOP_S)
        _wait_gone(node_pid, self.log)

    def stop(self) -> None:
        """End keeper and node in order; remove the run directory if it was made for them."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(_STOP_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        if self._remove:
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def log_tail(self) -> str:
        """Return the end of what keeper and node wrote."""
        with contextlib.suppress(FileNotFoundError):
            return self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            sys.stderr.write(f"--- {self.log}\n{self.log_tail()}\n")
        self.stop()


def start_node(
    run_dir: str | Path | None = None,
    *,
    arena_bytes: int = 64 << 20,
    name: str = "node-test",
    options: Sequence[str] = (),
    deadline_s: float = 120.0,
) -> RunningNode:
    """Start a keeper and return when its node serves.

    `run_dir` is made under /tmp (Unix socket paths are short) and removed later unless given.
    `options` go to `kvstore node` as they are. Raises `Unreachable`, with the end of the log, when
    the node is not ready in time.
    """
    directory = Path(run_dir) if run_dir is not None else new_run_dir()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = directory / "keeper.log"
    command = [
        sys.executable, "-m", "kvstore.cli.main", "node",
        "--run-dir", str(directory), "--name", name, "--arena-bytes", str(arena_bytes),
        "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0",
        "--parent-pid", str(os.getpid()), "--json", *options,
    ]  # fmt: skip
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=_environment(),
        )
    node = RunningNode(process, directory, log, remove=run_dir is None, facts={})
    try:
        node._facts = _first_line(process, deadline_s)
    except BaseException as error:
        tail = node.log_tail()
        node.stop()
        if isinstance(error, KvStoreError):
            raise Unreachable(f"{error}\n{tail}") from error
        raise
    return node


def new_run_dir() -> Path:
    """Return a new private directory with a short path, /tmp/kvstore-<uid>/<8 hex>."""
    parent = Path(f"/tmp/kvstore-{os.getuid()}")
    parent.mkdir(mode=0o700, exist_ok=True)
    directory = parent / secrets.token_hex(4)
    directory.mkdir(mode=0o700)
    return directory


def _environment() -> dict[str, str]:
    # The child imports the very package that runs here, installed or not.
    source = str(Path(kvstore.__file__).resolve().parents[1])
    known = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{known}" if known else source}


def _first_line(process: "subprocess.Popen[bytes]", deadline_s: float) -> dict[str, Any]:
    """Return the JSON object that the keeper prints when it is ready."""
    assert process.stdout is not None
    ends = time.monotonic() + deadline_s
    received = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not received.endswith(b"\n"):
            if not selector.select(max(0.0, ends - time.monotonic())):
                raise Unreachable(f"the node was not ready within {deadline_s} s")
            chunk = os.read(process.stdout.fileno(), 4096)
            if not chunk:
                raise Unreachable(f"the keeper ended with status {process.wait(_STOP_S)}")
            received += chunk
    facts: dict[str, Any] = json.loads(received)
    return facts


def _wait_gone(pid: int, log: Path) -> None:
    ends = time.monotonic() + _STOP_S
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > ends:
            raise Unreachable(f"process {pid} outlives its keeper; see {log}")
        time.sleep(_POLL_S)
