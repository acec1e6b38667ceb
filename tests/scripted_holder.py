"""A neighbour of a node, inside the test: lends what it was given, and misbehaves when told to."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc.aio

from kvstore.core.names import BlockName, Root
from kvstore.core.outcomes import Outcome
from kvstore.rpc.channel import listen, make_server
from kvstore.rpc.v1 import cache_pb2, cache_pb2_grpc
from kvstore.service.tickets import TicketBook
from kvstore.tiers.base import BlockHeader
from kvstore.tiers.peer import Neighbour
from kvstore.transport.bulk_server import BulkServer
from kvstore.transport.bulk_wire import Operation


class _Out:
    """Blocks on one ticket."""

    def __init__(self, blocks: list[bytes]) -> None:
        self._blocks = blocks
        self.lengths = [len(block) for block in blocks]

    def view(self, index: int) -> memoryview:
        return memoryview(self._blocks[index])

    def digest(self, block: memoryview) -> bytes:
        raise AssertionError("nothing is sent here")

    def accept(self, index: int, block_sum: bytes) -> Outcome:
        raise AssertionError("nothing is sent here")

    def done(self) -> None:
        pass


class ScriptedHolder(cache_pb2_grpc.CacheNodeServicer):  # type: ignore[misc]
    """Serves `Lend` and a bulk port. `spoil` may change each reply before it goes out."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.blocks: dict[tuple[Root, BlockName], tuple[BlockHeader, bytes]] = {}
        self.asked: list[list[bytes]] = []
        self.hang = False
        self.spoil: Callable[[cache_pb2.LendReply], None] = lambda reply: None
        self.neighbour = Neighbour(name, "")
        self._book = TicketBook()
        self._bulk = BulkServer(self._redeem)
        self._server, _ = make_server()
        self._address = ""

    async def start(self) -> "ScriptedHolder":
        cache_pb2_grpc.add_CacheNodeServicer_to_server(self, self._server)
        bound = listen(self._server, "127.0.0.1:0")
        await self._server.start()
        self._address = await self._bulk.start("127.0.0.1", 0)
        self.neighbour = Neighbour(self.name, bound)
        return self

    async def stop(self) -> None:
        await self._server.stop(None)
        await self._bulk.stop()

    async def Lend(
        self, request: cache_pb2.LendRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> cache_pb2.LendReply:
        names = [request.names[at : at + 32] for at in range(0, len(request.names), 32)]
        self.asked.append(names)
        if self.hang:
            await asyncio.sleep(3_600)
        found = [self.blocks.get((Root(request.root), BlockName(name))) for name in names]
        held = [one for one in found if one is not None]
        reply = cache_pb2.LendReply(sums=b"".join(header.sum for header, _ in held))
        reply.outcomes.extend(
            int(Outcome.MISS if one is None else Outcome.HIT)  # type: ignore[misc]
            for one in found
        )
        if held:
            reply.ticket = self._book.issue(
                Operation.FETCH,
                _Out([block for _, block in held]),
                session=0,
                host="127.0.0.1",
                now_ms=time.monotonic() * 1_000,
            )
            reply.bulk_address, reply.expires_ms = self._address, 10_000
        self.spoil(reply)
        return reply

    def _redeem(self, token: bytes, operation: Operation, host: str) -> Any:
        return self._book.redeem(token, operation, host, now_ms=time.monotonic() * 1_000)
