"""A keeper and node in the test's own loop that misbehave on demand: hang, lose answers, hang up.

Only for faults that a real node cannot be made to show at a chosen moment; everything else is
tested against the real processes. It reserves and frees slots in a real arena, decides nothing.
"""

import asyncio
import os
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from kvstore.client.session import SESSION_KEY
from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.slots import SlotState, SlotWord
from kvstore.rpc.channel import listen, make_server
from kvstore.rpc.v1 import cache_pb2, cache_pb2_grpc
from kvstore.transport.arena import ArenaMapping, ArenaSize, create_arena
from kvstore.transport.session_socket import Grant, receive_hello, send_grant

SLOTS = 16
ROOT = b"r" * 32
Step = Callable[[Any], Awaitable[Any]]


class ScriptedNode(cache_pb2_grpc.CacheNodeServicer):  # type: ignore[misc]
    """`script[method]` holds steps that replace the next answers; then it behaves."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.script: dict[str, list[Step]] = defaultdict(list)
        self.calls: list[tuple[str, Any]] = []
        self.root = ROOT
        self.incarnation = 1
        self.sessions = 0
        self._fd = create_arena(ArenaSize(SLOTS * GRANULE_BYTES, SLOTS))
        self.arena = ArenaMapping(self._fd, owner=True)
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)

    async def start(self) -> None:
        """Serve both sockets."""
        self._listener.bind(str(self.run_dir / "keeper.sock"))
        self._listener.listen()
        asyncio.get_running_loop().add_reader(self._listener, self._accept)
        await self.start_rpc()

    async def start_rpc(self) -> None:
        """Serve gRPC, as a node that its keeper has just started."""
        self._server, _ = make_server()
        cache_pb2_grpc.add_CacheNodeServicer_to_server(self, self._server)
        listen(self._server, f"unix:{self.run_dir}/node.sock")
        await self._server.start()

    async def stop_rpc(self) -> None:
        """Go away, as a node that was killed."""
        await self._server.stop(None)

    def hang_up(self) -> None:
        """End every session, as a keeper that was killed; new ones are accepted."""
        for sock in self._open:
            sock.close()
        self._open.clear()

    def stop_accepting(self) -> None:
        """Have no keeper at all."""
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        (self.run_dir / "keeper.sock").unlink()

    async def stop(self) -> None:
        """Give everything back."""
        self.hang_up()
        if self._listener.fileno() >= 0:
            self.stop_accepting()
        await self.stop_rpc()
        self.arena.close()
        os.close(self._fd)

    def reserved(self) -> list[int]:
        """Return the slots that are reserved now."""
        return [s for s in range(SLOTS) if self.arena.word(s).state is SlotState.RESERVED]

    def count(self, method: str) -> int:
        """Return how often a method was called."""
        return sum(name == method for name, _ in self.calls)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        receive_hello(sock)
        self.sessions += 1
        address = f"unix:{self.run_dir}/node.sock"
        token = self.sessions.to_bytes(16, "big")
        send_grant(
            sock, Grant(self.sessions, token, address, "scripted", self.incarnation), self._fd
        )
        self._open.append(sock)

    async def _answer(self, method: str, request: Any, default: Step) -> Any:
        self.calls.append((method, request))
        if self.script[method]:
            return await self.script[method].pop(0)(request)
        return await default(request)

    async def OpenSession(self, request: Any, context: Any) -> Any:
        async def opened(request: Any) -> Any:
            return cache_pb2.OpenSessionReply(
                root=self.root, incarnation=self.incarnation, lease_ms=30_000
            )

        return await self._answer("OpenSession", request, opened)

    async def CloseSession(self, request: Any, context: Any) -> Any:
        self.calls.append(("CloseSession", request))
        return cache_pb2.CloseSessionReply()

    async def Acquire(self, request: Any, context: Any) -> Any:
        token = dict(context.invocation_metadata())[SESSION_KEY]
        session = int.from_bytes(token, "big")

        async def acquired(request: Any) -> Any:
            return self.reserve(session, request.reserve)

        return await self._answer("Acquire", request, acquired)

    async def Settle(self, request: Any, context: Any) -> Any:
        async def settled(request: Any) -> Any:
            for refs, state in (
                (request.commit, SlotState.COMMITTED),
                (request.abort, SlotState.FREE),
            ):
                for slot in refs.slots:
                    self.arena.set_word(slot, self.arena.word(slot).to(state))
            done = cache_pb2.SETTLE_OUTCOME_DONE
            return cache_pb2.SettleReply(
                commit=[done] * len(request.commit.slots),
                abort=[done] * len(request.abort.slots),
                release=[done] * len(request.release),
            )

        return await self._answer("Settle", request, settled)

    def reserve(self, session: int, count: int) -> cache_pb2.AcquireReply:
        """Reserve free slots as a node does and return the answer."""
        reply = cache_pb2.AcquireReply(incarnation=self.incarnation)
        for index in range(count):
            slot = next(s for s in range(SLOTS) if self.arena.word(s).state is SlotState.FREE)
            word: SlotWord = self.arena.word(slot).to(SlotState.RESERVED, session=session)
            self.arena.set_word(slot, word)
            reply.reserved_names.append(index)
            reply.reserved_slots.append(slot)
            reply.reserved_offsets.append(slot)
            reply.reserved_generations.append(word.generation)
        return reply
