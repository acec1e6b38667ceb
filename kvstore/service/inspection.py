"""Answers `Inspect`: what a slot holds and for whom, read and nothing else."""

import asyncio
from typing import Final

import numpy as np

from kvstore.core.errors import BadInput, Forbidden
from kvstore.core.limits import NAME_BYTES
from kvstore.core.names import BlockName
from kvstore.core.slots import SlotState
from kvstore.directory.events import TierKind
from kvstore.rpc.gate import identify
from kvstore.rpc.identity import Identity, Role
from kvstore.rpc.v1 import inspect_pb2, inspect_pb2_grpc
from kvstore.service.below import BelowDram
from kvstore.service.requests import Context
from kvstore.service.store import ArenaStore

MIN_PREFIX_BYTES: Final = 4
"""Shorter beginnings of names fit too many blocks to be of use."""
MAX_SLOTS: Final = 32
"""Slots in one answer."""
_SLICE: Final = 65_536
"""Slots between two looks at other work: about 2 ms."""
_FREE: Final = int(SlotState.FREE)


class InspectorService(inspect_pb2_grpc.InspectorServicer):  # type: ignore[misc]
    """Reads the slot table of one node on its event loop."""

    def __init__(self, store: ArenaStore, below: BelowDram, identity: Identity) -> None:
        self._store = store
        self._below = below
        self._identity = identity

    async def Inspect(
        self, request: inspect_pb2.InspectRequest, context: Context
    ) -> inspect_pb2.InspectReply:
        """Describe a slot by its number, or the slots whose block's name begins so."""
        # Names and domains of all tenants can be seen here.
        principal = identify(self._identity, context)
        if Role.ADMIN not in principal.roles:
            raise Forbidden("inspecting needs the admin role")
        slots = len(self._store.table.state)
        if request.WhichOneof("what") == "slot":
            if request.slot >= slots:
                raise BadInput(f"slot {request.slot}; the arena has {slots}")
            return inspect_pb2.InspectReply(slots=[self._report(request.slot)], max_slots=slots)
        if not MIN_PREFIX_BYTES <= len(request.name) <= NAME_BYTES:
            raise BadInput(f"name has {MIN_PREFIX_BYTES} to {NAME_BYTES} bytes, not the"
                           f" {len(request.name)} given")  # fmt: skip
        found = await self._named(request.name)
        reply = inspect_pb2.InspectReply(
            slots=map(self._report, found[:MAX_SLOTS]), more=len(found) > MAX_SLOTS, max_slots=slots
        )
        if not found and len(request.name) == NAME_BYTES:
            reply.below_only.extend(map(int, self._below_of_any_root(request.name)))  # type: ignore[arg-type]
        return reply

    async def _named(self, prefix: bytes) -> list[int]:
        """Return the used slots of blocks named so, one more than is shown at most."""
        table = self._store.table
        wanted = np.frombuffer(prefix, np.uint8)
        found: list[int] = []
        for first in range(0, len(table.state), _SLICE):
            states = np.frombuffer(table.state, np.uint8)[first : first + _SLICE]
            used = np.flatnonzero(states != _FREE) + first
            names = np.frombuffer(table.arena.names(used), np.uint8).reshape(-1, NAME_BYTES)
            same = (names[:, : len(prefix)] == wanted).all(axis=1)
            found += used[same].tolist()
            if len(found) > MAX_SLOTS:
                break
            await asyncio.sleep(0)
        return found[: MAX_SLOTS + 1]

    def _below_of_any_root(self, name: bytes) -> list[TierKind]:
        roots = self._store.table.roots
        held = 0
        for number in range(len(roots)):
            held |= self._below.bits(roots.at(number).root, BlockName(name))
        return _tiers(held)

    def _report(self, slot: int) -> inspect_pb2.SlotReport:
        table = self._store.table
        record, state = table.arena.record(slot), SlotState(table.state[slot])
        report = inspect_pb2.SlotReport(
            slot=slot,
            state=state.name.lower(),
            generation=table.generation[slot],
            offset=record.offset,
            block_bytes=record.block_bytes,
        )
        if not table.generation[slot]:
            return report  # never used: its record says nothing
        report.name, report.root, report.position = record.name, record.root, record.position
        if state is SlotState.FREE:
            return report
        info = table.root_of(slot)
        session = self._store.sessions.by_number(table.writer[slot])
        report.domain, report.group = info.domain, info.group
        report.servable, report.pins = bool(table.servable[slot]), table.pins[slot]
        report.session = table.writer[slot]
        report.client = session.client if session is not None else ""
        report.sum = record.sum if state is SlotState.SEALED else b""
        report.indexed = table.index.get(table.key[slot]) == slot
        held = self._below.bits(info.root, BlockName(record.name))
        report.below.extend(map(int, _tiers(held)))  # type: ignore[arg-type]
        return report


def _tiers(bits: int) -> list[TierKind]:
    return [tier for tier in TierKind if bits >> int(tier) & 1]
