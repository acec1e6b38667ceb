"""The actors that Ray keeps alive: each a thin shell around one server object or process.

A shell starts empty. The controller tells it to start and asks for its report; requests go
straight to the server inside, over gRPC or HTTP, never through Ray.
"""

import asyncio
import contextlib
import json
import os
import sys
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from kvstore.core.errors import KvStoreError, Unreachable
from kvstore.core.heap import settle_heap
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.plan import MemberList, Phase, Report, Role
from kvworkers.cluster.rundir import last_line

_STOP_SECONDS: Final = 8.0
"""How long a part may take to end in good order before it is killed."""

_DRAIN_MS: Final = 2_000
"""How long running requests may go on while a cluster ends."""

_KEEPER_READY_SECONDS: Final = 120.0
"""First touch of an arena ran at 1 GB/s on a slow machine: 120 s are enough for 100 GiB."""

_NODE_POLL_SECONDS: Final = 0.05
_KEEPER_BACKOFF_SECONDS: Final = (0.1, 5.0)


class Shell(ABC):
    """What all parts have in common: phase, incarnation, report, start once."""

    role: Role

    def __init__(self, name: str, config: ClusterConfig) -> None:
        self._config = config
        self._report = Report(
            name=name, role=self.role, phase=Phase.EMPTY, pid=os.getpid(), ray_node=_ray_node()
        )
        self._starting: asyncio.Task[None] | None = None

    async def report(self) -> Report:
        """Return what this part says of itself."""
        return self._report

    async def start(self, incarnation: int, host: str) -> Report:
        """Begin to serve as this incarnation on the host so named; the report tells how it goes.

        Does nothing when already at it. Returns at once: loading a model takes longer than a
        call may.
        """
        if self._report.phase in (Phase.EMPTY, Phase.FAILED):
            self._note(phase=Phase.STARTING, incarnation=incarnation, host=host, detail="")
            self._starting = asyncio.create_task(self._try_to_serve(), name=self._report.name)
        return self._report

    async def _try_to_serve(self) -> None:
        try:
            await self._serve()
            settle_heap()
        except KvStoreError as error:
            self._note(phase=Phase.FAILED, detail=str(error))
        except Exception as error:  # task boundary: counted by the controller as a failed start
            self._note(phase=Phase.FAILED, detail=f"{type(error).__name__}: {error}")

    @abstractmethod
    async def _serve(self) -> None:
        """Start the server inside and note its addresses and `Phase.SERVING`."""

    @abstractmethod
    async def stop(self) -> None:
        """End the server inside in good order."""

    def _note(self, **changes: Any) -> None:
        self._report = replace(self._report, **changes)

    @property
    def _node_dir(self) -> Path:
        """The run directory of this host's keeper: hosts may share one file system in tests."""
        return self._config.run_dir / self._report.host


class NodeShell(Shell):
    """Runs a host's keeper (and so its cache node) as a subprocess and restarts it when it ends."""

    role = Role.NODE

    def __init__(self, name: str, config: ClusterConfig) -> None:
        super().__init__(name, config)
        self._keeper: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    async def _serve(self) -> None:
        await self._launch()
        self._watch = asyncio.create_task(self._keep(), name="keep-keeper")

    def _tier_flags(self) -> tuple[str, ...]:
        """Return the flags of what lies below this node's memory, and of the key that names it."""
        config = self._config
        flags = [
            *("--cluster-key-file", str(config.key_file())),
            *("--peers", str(self._peers_file)),
        ]
        if config.nvme is not None:
            flags += ["--nvme", str(config.nvme / self._report.name)]
            flags += ["--nvme-bytes", str(config.nvme_bytes)]
        if config.files is not None:
            flags += ["--files", str(config.files), "--files-bytes", str(config.files_bytes)]
        for rule in config.quotas:
            flags += ["--quota", rule]
        return tuple(flags)

    @property
    def _peers_file(self) -> Path:
        """Beside the run directory: the keeper makes that one, and the list may come before."""
        return self._config.run_dir / f"{self._report.name}.peers.json"

    async def set_members(self, members: MemberList) -> Report:
        """Let the node follow the other nodes; the last list stays when the controller is gone."""
        listed = [
            {"name": one.name, "address": one.address}
            for one in members.members
            if one.role is Role.NODE
        ]
        fresh = self._peers_file.with_suffix(".new")
        await asyncio.to_thread(fresh.write_text, json.dumps({"peers": listed}))
        fresh.replace(self._peers_file)
        self._note(members_version=members.version)
        return self._report

    def _security_flags(self) -> tuple[str, ...]:
        host = self._config.listen_host()
        where = ("--listen", f"{host}:0", "--metrics", f"{host}:0", "--bulk", f"{host}:0")
        security = self._config.security
        return where if security is None else (*where, "--security", str(security))

    async def _launch(self) -> None:
        # Another host of the cluster has no run directory yet, and a new disk no directory of ours.
        # What that lies in has to be there: it is where a disk is mounted.
        self._config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in (self._config.nvme, self._config.files):
            if directory is not None:
                directory.mkdir(mode=0o700, exist_ok=True)
        command = [
            *(sys.executable, "-m", "kvstore.cli.main", "node", "--json"),
            *("--run-dir", str(self._node_dir), "--name", self._report.name),
            *("--arena-bytes", str(self._config.arena_bytes)),
            *("--policy", self._config.policy),
            *("--trace", self._config.trace),
            *("--events-redis", self._config.events_redis),
            *self._tier_flags(),
            *self._security_flags(),
            *("--parent-pid", str(os.getpid())),
        ]
        log = self._config.run_dir / f"{self._report.name}.log"
        with log.open("ab") as errors:
            self._keeper = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
            )
        assert self._keeper.stdout is not None
        try:
            async with asyncio.timeout(_KEEPER_READY_SECONDS):
                line = await self._keeper.stdout.readline()
        except TimeoutError:
            self._keeper.kill()
            raise Unreachable(f"the keeper was not ready in {_KEEPER_READY_SECONDS} s") from None
        if not line:
            status = await self._keeper.wait()
            raise Unreachable(f"the keeper ended with status {status}: {last_line(log)}")
        facts = json.loads(line)
        self._note(
            phase=Phase.SERVING,
            address=str(facts["listen"]),
            metrics=str(facts.get("metrics") or ""),
            detail="",
        )

    async def _keep(self) -> None:
        """Bring the keeper back whenever it ends; each return is a new incarnation."""
        pause, longest = _KEEPER_BACKOFF_SECONDS
        while True:
            assert self._keeper is not None
            status = await self._keeper.wait()
            self._note(
                phase=Phase.STARTING,
                detail=f"the keeper ended with status {status}",
                incarnation=self._report.incarnation + 1,
            )
            await asyncio.sleep(pause)
            try:
                await self._launch()
                pause = _KEEPER_BACKOFF_SECONDS[0]
            except Exception as error:  # task boundary: without this loop no keeper ever comes back
                self._note(phase=Phase.STARTING, detail=f"{type(error).__name__}: {error}")
                pause = min(longest, pause * 2)

    async def stop(self) -> None:
        """End the keeper; its node and sockets go with it."""
        if self._watch is not None:
            self._watch.cancel()
        keeper = self._keeper
        if keeper is None or keeper.returncode is not None:
            return
        keeper.terminate()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await keeper.wait()
        except TimeoutError:
            keeper.kill()
            await keeper.wait()


class WorkerShell(Shell):
    """Runs one worker, or its rank 0, on the devices that its placement group bundle pins."""

    role = Role.WORKER

    def __init__(self, name: str, config: ClusterConfig, bundle: int = 0) -> None:
        super().__init__(name, config)
        self._bundle = bundle
        self._server: Any = None
        self._end: asyncio.Task[None] | None = None

    async def _serve(self) -> None:
        self._server = await asyncio.to_thread(self._build)
        await self._node_is_up()
        await self._server.start()
        self._note(
            phase=Phase.SERVING,
            address=self._server.address,
            metrics=self._server.metrics_address,
            model=self._server.model_name,
        )
        self._end = asyncio.create_task(self._end_when_broken(), name="broken")

    async def _node_is_up(self) -> None:
        """Wait until this host's node has been up once, so that no prompt is named without it.

        After the wait the worker goes on alone: a missing node makes it slower, never absent.
        """
        note = self._node_dir / "node.json"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KEEPER_READY_SECONDS):
                while not await asyncio.to_thread(note.exists):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(_NODE_POLL_SECONDS)

    async def _end_when_broken(self) -> None:
        """End the process when its model fails step after step: Ray then starts a fresh one."""
        await self._server.broken.wait()
        os._exit(1)

    def _build(self) -> Any:
        """Import the engine and make the server; imports alone take seconds."""
        from kvworkers.cluster.rank_actors import rank_actors
        from kvworkers.worker import WorkerServer
        from kvworkers.worker_config import WorkerConfig

        chosen, where = self._config, self._config.listen_host()
        config = WorkerConfig(
            model=str(chosen.model),
            node=str(self._node_dir),
            host=self._report.host,
            name=self._report.name,
            role=chosen.role_of(self._report.name),
            incarnation=self._report.incarnation,
            pool_bytes=chosen.pool_bytes or None,
            threads=chosen.threads_per_worker(),
            tensor_parallel=chosen.tensor_parallel,
            swap_bytes=chosen.swap_bytes,
            overcommit=chosen.overcommit,
            policy=chosen.policy,
            fidelity=chosen.fidelity,
            trace=chosen.trace,
            events_redis=chosen.events_redis,
            drain_ms=_DRAIN_MS,
            listen=f"{where}:0",
            metrics=f"{where}:0",
            security=chosen.security,
        )
        return WorkerServer(config, rank_actors(self._bundle, chosen.tensor_parallel))

    async def drain(self, drain_ms: int) -> None:
        """Refuse new requests and finish those that run, for so long; then it serves no more."""
        if self._end is not None:
            self._end.cancel()
        if self._server is not None:
            await self._server.drain(drain_ms=drain_ms)

    async def stop(self) -> None:
        """End the server inside; requests still running get a moment to finish."""
        if self._end is not None:
            self._end.cancel()
        if self._server is not None:
            server, self._server = self._server, None
            async with asyncio.timeout(_STOP_SECONDS):
                await server.stop()


class FrontendShell(Shell):
    """Runs the HTTP and gRPC frontends with the router in the same process."""

    role = Role.FRONTEND

    def __init__(self, name: str, config: ClusterConfig) -> None:
        super().__init__(name, config)
        self._server: Any = None

    async def _serve(self) -> None:
        self._server = await asyncio.to_thread(self._build)
        await self._server.start()
        self._note(
            phase=Phase.SERVING,
            address=self._reached(self._server.grpc_address),
            http=self._reached(self._server.http_address),
            metrics=self._reached(self._server.http_address),
        )

    def _build(self) -> Any:
        from kvstore.router.router import RouterConfig
        from kvworkers.frontends.server import FrontendConfig, FrontendServer

        chosen, index = self._config, int(self._report.name.rpartition("-")[2])
        config = FrontendConfig(
            model=chosen.model,
            http=str(chosen.frontend_address(chosen.http, index)),
            grpc=str(chosen.frontend_address(chosen.grpc, index)),
            security=chosen.security,
            trace=chosen.trace,
            drain_ms=_DRAIN_MS,
            router=RouterConfig(events_redis=chosen.events_redis),
        )
        return FrontendServer(config)

    def _reached(self, address: str) -> str:
        """Return an address that others can call, where it listens on all of the host's."""
        host, _, port = address.rpartition(":")
        if host not in ("0.0.0.0", "[::]"):
            return address
        return f"{self._config.listen_host()}:{port}"

    async def report(self) -> Report:
        """Return what this part says of itself, and whether a worker could take a request now."""
        if self._report.phase is Phase.SERVING:
            self._note(usable=self._server.ready())
        return self._report

    async def set_members(self, members: MemberList) -> Report:
        """Follow this list from now on; the last one stays when the controller is gone."""
        if self._report.phase is Phase.SERVING:
            from kvstore.router.members import Member

            await self._server.set_members(
                [
                    Member(
                        kind="worker" if report.role is Role.WORKER else "node",
                        name=report.name,
                        address=report.address,
                        host=report.host,
                        incarnation=report.incarnation,
                    )
                    for report in members.members
                ]
            )
            self._note(members_version=members.version)
        return self._report

    async def drain(self, drain_ms: int) -> None:
        """Refuse new requests and finish those that run, for so long; then it serves no more."""
        if self._server is not None:
            await self._server.stop(drain_ms=drain_ms)

    async def stop(self) -> None:
        """Stop listening; requests still running get a moment to finish."""
        if self._server is not None:
            server, self._server = self._server, None
            async with asyncio.timeout(_STOP_SECONDS):
                await server.stop()


SHELLS: Final[dict[Role, type[Shell]]] = {
    Role.NODE: NodeShell,
    Role.WORKER: WorkerShell,
    Role.FRONTEND: FrontendShell,
}


def _ray_node() -> str:
    """Return where Ray runs this process; nothing outside of Ray."""
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""
