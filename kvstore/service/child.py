"""The keeper's care for its node: spawn, listen, ping, replace. One task, one node at a time."""

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable
from typing import Any, Final

from kvstore.core.errors import Unreachable
from kvstore.service.config import KeeperConfig
from kvstore.service.control import SESSIONS_PER_MESSAGE, Control, Message, control_pair

_BACKOFF_S: Final = (0.1, 5.0)
_SETTLED_S: Final = 10.0
_log = logging.getLogger("kvstore.keeper")

SessionRow = tuple[int, str, str, bool]
"""(number, token in hex, client, closed): what the node is told of a session."""


class NodeChild:
    """Keeps one node running over one arena."""

    def __init__(
        self,
        config: KeeperConfig,
        arena_fd: int,
        sessions: Callable[[], list[SessionRow]],
        on_ready: Callable[[], None],
        on_writers_done: Callable[[int], None] = lambda number: None,
        *,
        numa_nodes: int = 0,
    ) -> None:
        """`numa_nodes`: how many NUMA nodes the arena was put on; 0: on none in particular."""
        self._numa_nodes = numa_nodes
        self._config = config
        self._arena_fd = arena_fd
        self._sessions = sessions
        self._on_ready = on_ready
        self._on_writers_done = on_writers_done
        self._control: Control | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._unanswered_s: float | None = None
        self._ready = asyncio.Event()
        self.listen = config.listen
        """TCP address; the port is chosen by the first node and kept by its successors."""
        self.metrics = config.metrics
        self.bulk = config.bulk
        self.incarnation = 0
        self.restarts = 0

    @property
    def pid(self) -> int:
        """Process id of the node of this moment, 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    async def run(self) -> None:
        """Start nodes until cancelled; raises `Unreachable` when the first is never ready."""
        loop = asyncio.get_running_loop()
        delay_s = _BACKOFF_S[0]
        while True:
            started_s = loop.time()
            status: int | str
            try:
                status = await self._one()
            except OSError as error:  # no descriptor or no memory for a process now: try again
                status = str(error)
            finally:
                await self._end()
            if not self.incarnation:
                raise Unreachable(f"the cache node did not start (exit status {status})")
            if loop.time() - started_s > _SETTLED_S:
                delay_s = _BACKOFF_S[0]
            self.restarts += 1
            _log.warning("node ended (status %s); the next one in %.1f s", status, delay_s)
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, _BACKOFF_S[1])

    def tell(self, operation: str, **fields: Any) -> None:
        """Send a message to the node; without a node it is lost (the next one is told all)."""
        if self._control is None:
            return
        try:
            left = self._control.send(operation, **fields)
        except Unreachable:
            return  # it is ending; the watcher of the process sees to the rest
        if left:
            asyncio.get_running_loop().add_writer(self._control.fileno(), self._flush)

    async def _one(self) -> int:
        """Run one node until its process ends; returns its exit status."""
        ours, theirs = control_pair()
        self._control = Control(ours)
        self._ready.clear()
        try:
            process = await self._spawn(theirs)
        finally:
            theirs.close()
        self._process = process
        asyncio.get_running_loop().add_reader(self._control.fileno(), self._hear)
        rows = self._sessions()
        for at in range(0, len(rows), SESSIONS_PER_MESSAGE):
            self.tell("sessions", sessions=rows[at : at + SESSIONS_PER_MESSAGE])
        self.tell("start")
        guard = asyncio.create_task(self._guard(process))
        try:
            return await process.wait()
        finally:
            guard.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await guard

    async def _spawn(self, theirs: socket.socket) -> asyncio.subprocess.Process:
        config = self._config
        options = {
            "--arena-fd": self._arena_fd,
            "--control-fd": theirs.fileno(),
            "--name": config.name,
            "--rpc": config.rpc,
            "--listen": self.listen,
            "--metrics": self.metrics,
            "--bulk": self.bulk,
            "--cluster-key-file": config.key_file,
            "--lease-ms": config.lease_ms,
            "--claim-ms": config.claim_ms,
            "--policy": config.policy,
            "--scrub-bytes-per-s": config.scrub_bytes_per_s,
            "--security": config.security.absolute() if config.security else "",
            "--trace": config.trace,
            "--numa-nodes": self._numa_nodes,
            "--nvme": config.nvme or "",
            "--nvme-bytes": config.nvme_bytes,
            "--events-redis": config.events_redis,
            "--files": config.files or "",
            "--files-bytes": config.files_bytes,
            "--peers": config.peers or "",
        }
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "kvstore.service.node",
            *(f"{flag}={value}" for flag, value in options.items()),
            *(f"--quota={rule}" for rule in config.quotas),
            pass_fds=(self._arena_fd, theirs.fileno()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
        )

    async def _guard(self, process: asyncio.subprocess.Process) -> None:
        """Kill a node that does not get ready, or leaves a ping unanswered too long."""
        config = self._config
        try:
            async with asyncio.timeout(config.start_ms / 1_000):
                await self._ready.wait()
        except TimeoutError:
            _log.error("node %d was not ready in time: killed", process.pid)
            process.kill()
            return
        loop = asyncio.get_running_loop()
        number = 0
        while True:
            number += 1
            if self._unanswered_s is None:
                self._unanswered_s = loop.time()
            self.tell("ping", n=number)
            await asyncio.sleep(min(config.ping_period_ms, config.hang_ms / 2) / 1_000)
            waited_s = loop.time() - (self._unanswered_s or loop.time())
            if waited_s * 1_000 > config.hang_ms:
                _log.error("node %d hangs for %.1f s: killed", process.pid, waited_s)
                process.kill()
                return

    def _hear(self) -> None:
        assert self._control is not None
        try:
            while (message := self._control.receive()) is not None:
                self._obey(message)
        except Unreachable:
            asyncio.get_running_loop().remove_reader(self._control.fileno())

    def _obey(self, message: Message) -> None:
        self._unanswered_s = None
        if message["op"] == "ready":
            self.incarnation = message["incarnation"]
            self.listen, self.metrics = message["listen"], message["metrics"]
            self.bulk = message["bulk"]
            self._ready.set()
            self._on_ready()
        elif message["op"] == "writers_done":
            self._on_writers_done(message["number"])

    def _flush(self) -> None:
        assert self._control is not None
        try:
            left = self._control.flush()
        except Unreachable:
            left = False
        if not left:
            asyncio.get_running_loop().remove_writer(self._control.fileno())

    async def _end(self) -> None:
        """Close the control socket, which ends the node; kill it when that takes too long."""
        control, process = self._control, self._process
        self._control = self._process = None
        self._unanswered_s = None
        if control is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(control.fileno())
            loop.remove_writer(control.fileno())
            control.close()
        if process is None or process.returncode is not None:
            return
        try:
            async with asyncio.timeout(self._config.stop_ms / 1_000):
                await process.wait()
        except TimeoutError:
            _log.error("node %d did not end in time: killed", process.pid)
            process.kill()
            await process.wait()
