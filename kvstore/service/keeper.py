"""The keeper: owns the arena and the session sockets, and runs the cache node as its child.

It is small so that it does not die: no gRPC, no block ever looked at. A node may crash, hang or be
killed; the memfd, every client's mapping of it and every session live on here, and the next
incarnation is told which sessions live.

    client ──hello──▶ keeper ──opened──▶ node        session = socket + pidfd of each process
    client ◀─grant+memfd─┘                            end of the socket or of any: closed
                                                      end of all processes, or
                                                      nothing left to write:       exited
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kvstore.core.errors import BadInput, Refused
from kvstore.service.child import NodeChild
from kvstore.service.config import KeeperConfig
from kvstore.service.keeper_sessions import KeptSessions
from kvstore.transport.arena import ArenaMapping, create_arena
from kvstore.transport.numa import chosen_nodes, host_nodes

KEY_BYTES: Final = 32
_BACKLOG: Final = 128
_log = logging.getLogger("kvstore.keeper")


class Keeper:
    """One host's keeper."""

    def __init__(
        self,
        config: KeeperConfig,
        *,
        on_ready: Callable[[dict[str, Any]], None] = lambda described: None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._config = config
        self._on_ready = on_ready
        self._on_progress = on_progress
        self._ended = asyncio.Event()
        self._announced = False
        self._numa_nodes = 0

    async def run(self) -> None:
        """Keep until SIGTERM, SIGINT or the parent's end; leaves no socket behind.

        Raises `BadInput` for an unusable run directory or key, `Unreachable` when the node cannot
        start at all.
        """
        config = self._config
        prepare_run_dir(config.run_dir)
        with _locked(config.run_dir), contextlib.ExitStack() as stack:
            prepare_key(config.key_file)
            arena_fd = create_arena(config.arena_size)
            stack.callback(os.close, arena_fd)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._ended.set)
            self._watch_parent(stack)
            await self._prefault(arena_fd)
            if self._ended.is_set():
                return
            self._sessions = KeptSessions(config, arena_fd, self._tell)
            self._child = NodeChild(
                config,
                arena_fd,
                self._sessions.rows,
                self._ready,
                self._sessions.writers_done,
                numa_nodes=self._numa_nodes,
            )
            stack.callback(_remove, config.run_dir, "keeper.sock", "node.sock", "node.json")
            await self._serve()

    async def _serve(self) -> None:
        listener = _listen(self._config.keeper_socket)
        child = asyncio.create_task(self._child.run(), name="node")
        accepting = asyncio.create_task(self._sessions.accept(listener), name="accept")
        ended = asyncio.create_task(self._ended.wait(), name="ended")
        tasks = [child, accepting, ended]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            listener.close()
            self._sessions.close()
        for task in done:
            task.result()

    async def _prefault(self, arena_fd: int) -> None:
        """Touch the arena's pages once, off the loop, so that signals are still heard."""
        loop = asyncio.get_running_loop()

        def report(done: int, total: int) -> None:
            loop.call_soon_threadsafe(self._on_progress, done, total)
            if self._ended.is_set():
                raise InterruptedError

        arena = ArenaMapping(arena_fd, owner=True)
        if nodes := chosen_nodes(self._config.numa, host_nodes()):
            try:
                arena.place(nodes)
                self._numa_nodes = len(nodes)
            except OSError as error:  # slower on some GPUs, and no reason not to serve
                _log.warning("the arena lies where it falls, not on nodes %s: %s", nodes, error)
        with contextlib.suppress(InterruptedError):
            await asyncio.to_thread(arena.prefault, report)
        arena.close()

    def _tell(self, operation: str, **fields: Any) -> None:
        self._child.tell(operation, **fields)

    def _ready(self) -> None:
        self._sessions.incarnation = self._child.incarnation
        described = self._describe()
        _write_atomically(self._config.run_dir / "node.json", json.dumps(described).encode())
        if not self._announced:
            self._announced = True
            self._on_ready(described)

    def _describe(self) -> dict[str, Any]:
        config, child = self._config, self._child
        return {
            "name": config.name,
            "pid": os.getpid(),
            "node_pid": child.pid,
            "keeper_socket": str(config.keeper_socket),
            "rpc": config.rpc,
            "listen": child.listen,
            "bulk": child.bulk,
            "metrics": child.metrics,
            "incarnation": child.incarnation,
        }

    def _watch_parent(self, stack: contextlib.ExitStack) -> None:
        if not self._config.parent_pid:
            return
        try:
            parent = os.pidfd_open(self._config.parent_pid)
        except OSError as error:
            raise BadInput(f"--parent-pid {self._config.parent_pid}: {error.strerror}") from error
        stack.callback(os.close, parent)
        loop = asyncio.get_running_loop()
        loop.add_reader(parent, self._ended.set)
        stack.callback(loop.remove_reader, parent)


def prepare_run_dir(run_dir: Path) -> None:
    """Make the directory, or check that it is ours alone; `BadInput` when it is not."""
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = run_dir.lstat()
    except OSError as error:
        raise BadInput(f"--run-dir {run_dir}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise BadInput(f"--run-dir {run_dir} is not a directory")
    if found.st_uid != os.getuid():
        raise BadInput(f"--run-dir {run_dir} belongs to another user")
    if found.st_mode & 0o077:
        run_dir.chmod(0o700)


def prepare_key(path: Path) -> None:
    """Make the cluster key's file where it is missing; `BadInput` when it is not a private key."""
    try:
        if not path.exists():
            # Whole from the first moment: several nodes of one host may make it at once.
            fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)
            fresh.unlink()
        found = path.stat()
    except OSError as error:
        raise BadInput(f"--cluster-key-file {path}: {error.strerror}") from error
    if found.st_size != KEY_BYTES:
        raise BadInput(f"--cluster-key-file {path} has {found.st_size} bytes, not {KEY_BYTES}")
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BadInput(f"--cluster-key-file {path} must be its owner's alone (mode 0600)")


@contextlib.contextmanager
def _locked(run_dir: Path) -> Any:
    """Hold the run directory's lock: two keepers in one place would take each other's sockets."""
    fd = os.open(run_dir / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Refused(f"another keeper runs in {run_dir}") from None
    try:
        yield
    finally:
        os.close(fd)


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # a killed keeper's; the lock says that it is not alive
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.setblocking(False)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(_BACKLOG)
    return listener


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _remove(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).unlink(missing_ok=True)


def run_keeper(
    config: KeeperConfig,
    *,
    on_ready: Callable[[dict[str, Any]], None],
    on_progress: Callable[[int, int], None],
) -> None:
    """Run a keeper until it is asked to end; see `Keeper.run` for what it raises."""

    async def keep() -> None:
        await Keeper(config, on_ready=on_ready, on_progress=on_progress).run()

    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"[{config.name} keeper] %(message)s"
    )
    asyncio.run(keep())
