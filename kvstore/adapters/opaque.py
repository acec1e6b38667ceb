"""An engine's own bytes under its own keys: moved between its host memory and a node's arena.

What an adapter of an engine that hands over addresses needs, and no engine package. Everything
that goes wrong with the cache is a miss here, never an error: the engine computes instead.
A node that did not answer is left alone for a while, so a hung one costs a deadline now and
then and not one per batch.
"""

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple, TypeVar

from prometheus_client import REGISTRY

from kvstore.adapters.held import Held
from kvstore.client.blocking import Client
from kvstore.client.config import ClientConfig
from kvstore.client.replies import SlotRef
from kvstore.core.errors import BadInput, KvStoreError, Refused, SessionLost, Unreachable
from kvstore.core.names import BlockName, Namespace, NamespaceKind, Root
from kvstore.core.outcomes import MissReason, SettleOutcome
from kvstore.observe.adapter_metrics import AdapterMetrics
from kvstore.observe.client_metrics import ClientMetrics

PART_BYTES: Final = 64 << 20
"""Reserved, copied and committed at once: far below a session's reserve quota."""

_LOG: Final = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_STORED: Final = (SettleOutcome.DONE, SettleOutcome.ALREADY, SettleOutcome.DUPLICATE)


class Piece(NamedTuple):
    """A run of the engine's host memory, valid as long as the call lasts."""

    address: int
    size: int


Block = Sequence[Piece]
"""One block's bytes, in the order in which they are stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddress:
    """Where a node is, and how long it may take. Deadlines in milliseconds."""

    where: str
    """Run directory of this host's node, or its keeper's socket."""
    share_domain: str = ""
    name: str = ""
    pause_ms: int = 1_000
    """How long a node that did not answer is not asked again."""
    client: ClientConfig = field(default_factory=ClientConfig)

    def __post_init__(self) -> None:
        if not self.where:
            raise BadInput("where is empty: the node's run directory has to be given")
        if self.pause_ms < 0:
            raise BadInput(f"pause_ms is {self.pause_ms}")


class OpaqueBlocks:
    """Blocks of one size under one namespace. Safe to use from several threads at once."""

    def __init__(self, address: StoreAddress, namespace: Namespace, payload_bytes: int) -> None:
        if namespace.kind is not NamespaceKind.OPAQUE:
            raise BadInput(f"the bytes of an engine are opaque, not {namespace.kind!r}")
        self.payload_bytes = payload_bytes
        self._address = address
        self._namespace = namespace
        self._client: Client | None = None
        self._connecting = threading.Lock()
        self._silent_until_s = 0.0
        self._closed = False
        self._engine = address.name or "other"

    def connect(self) -> None:
        """Open the session now; an absent node is let be and tried again by later calls.

        Raises what no waiting will mend: `BadInput`, `Forbidden`, `Unauthenticated`.
        """
        try:
            self._connected()
        except (Unreachable, SessionLost, Refused) as error:
            self._silence(error)

    def prefix(self, names: Sequence[BlockName]) -> int:
        """Return how many of `names`, from the first, are here: one round trip, a hint."""
        if not names:
            return 0
        began = time.perf_counter()
        found = self._tried(lambda client: client.lookup(names).prefix, 0)
        self.count("lookup", [at < found for at in range(len(names))], began)
        return found

    def held(self, names: Sequence[BlockName]) -> list[bool]:
        """Say for each name whether it is here: one round trip, a hint."""
        nothing = [False] * len(names)
        if not names:
            return nothing
        began = time.perf_counter()
        found = self._tried(lambda client: [bool(at) for at in client.lookup(names).tiers], nothing)
        self.count("lookup", found, began)
        return found

    def load(self, names: Sequence[BlockName], into: Sequence[Block]) -> list[bool]:
        """Copy the longest prefix of `names` out; say for each whether its bytes are whole.

        Where the answer is False the memory may hold anything.
        """
        self._check(names, into)
        done = [False] * len(names)
        if names:
            began = time.perf_counter()
            self._tried(lambda client: self._load(client, names, into, done), None)
            self.count("load", done, began)
        return done

    def hold(self, names: Sequence[BlockName], *, wait_ms: int = 0) -> Held | None:
        """Lease the longest prefix of `names` that is in memory, or comes up within `wait_ms`.

        One round trip where nothing has to come up. None: nothing of it is held.
        """
        if not names:
            return None
        began = time.perf_counter()
        held = self._tried(lambda client: _held(client, names, wait_ms), None)
        found = held.blocks if held is not None else 0
        self.count("lookup", [at < found for at in range(len(names))], began)
        return held

    def store(self, names: Sequence[BlockName], blocks: Sequence[Block]) -> list[bool]:
        """Copy blocks in; say for each whether it is here now, or being stored by another.

        Goes on behind a block that is there already; ends where the node has no room.
        """
        self._check(names, blocks)
        done = [False] * len(names)
        if names:
            began = time.perf_counter()
            self._tried(lambda client: self._store(client, names, blocks, done), None)
            self.count("store", done, began)
        return done

    def publisher(self) -> tuple[str, Root] | None:
        """Return where the node tells what it holds, and under which root; None: no session yet."""
        client = self._client
        return None if client is None else (client.address, client.root)

    def close(self) -> None:
        """End the session. Harmless when repeated; later calls find nothing."""
        with self._connecting:
            self._closed = True
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _load(
        self, client: Client, names: Sequence[BlockName], into: Sequence[Block], done: list[bool]
    ) -> None:
        limit_ms = self._address.client.transfer_ms
        got = client.acquire(names, pending_ms=limit_ms)
        try:
            refs = got.ready
            if got.pending:
                arrived = client.wait_ready(got.pending, deadline_ms=limit_ms)
                refs = refs + got.pending[:arrived]
            for at, ref in enumerate(refs):
                _move(client, ref, into[at], inward=False)
                if not client.still(ref):  # reused while it was copied: a miss from here on
                    break
                done[at] = True
        finally:
            if got.lease:
                client.settle(release=[got.lease])

    def _store(
        self, client: Client, names: Sequence[BlockName], blocks: Sequence[Block], done: list[bool]
    ) -> None:
        step = max(1, PART_BYTES // client.block_bytes)
        for first in range(0, len(names), step):
            part = range(first, min(first + step, len(names)))
            if not self._store_part(client, names, blocks, part, done):
                return

    def _store_part(
        self, client: Client, names: Sequence[BlockName], blocks: Sequence[Block], part: range,
        done: list[bool],
    ) -> bool:  # fmt: skip
        """Store one part; say whether the node had room for all of it."""
        wanted = [names[at] for at in part]
        got = client.acquire(wanted, reserve=len(part), first_block=part.start)
        slots = [item.slot for item in got.reserved]
        release = [got.lease] if got.lease else []
        try:
            for item in got.reserved:
                _move(client, item.slot, blocks[part[item.index]], inward=True)
        except BaseException:
            client.settle(abort=slots, release=release)
            raise
        for at in part[: len(got.ready) + len(got.pending)]:
            done[at] = True
        settled = client.settle(commit=slots, release=release) if slots or release else None
        given = {item.index for item in got.reserved}
        if settled is not None:
            for item, outcome in zip(got.reserved, settled.commit, strict=True):
                done[part[item.index]] = outcome in _STORED
        others = [at for i, at in enumerate(part) if i not in given and not done[at]]
        refused = got.reserve_reason not in (MissReason.NONE, MissReason.COMPUTING)
        if not refused:
            for at in others:
                done[at] = True
        elif others:
            held = client.lookup([names[at] for at in others]).tiers
            for at, tiers in zip(others, held, strict=True):
                done[at] = bool(tiers)
        return not refused

    def count(self, call: str, done: Sequence[bool], began_s: float) -> None:
        """Count a call that was begun at `began_s`, by what became of each of its blocks."""
        metrics, engine = adapter_metrics(), self._engine
        metrics.seconds.labels(engine, call).observe(time.perf_counter() - began_s)
        good, bad = ("held", "refused") if call == "store" else ("hit", "miss")
        count = sum(done)
        metrics.blocks.labels(engine, call, good).inc(count)
        metrics.blocks.labels(engine, call, bad).inc(len(done) - count)
        if call != "lookup":
            metrics.bytes.labels(engine, call).inc(count * self.payload_bytes)

    def _tried(self, work: Callable[[Client], _Result], otherwise: _Result) -> _Result:
        if time.monotonic() < self._silent_until_s:
            return otherwise
        try:
            return work(self._connected())
        except (Unreachable, SessionLost) as error:
            self._silence(error)
        except KvStoreError as error:
            # Refused, over quota: the client counted it, and the engine computes.
            _LOG.warning("the cache node said: %s", error)
        return otherwise

    def _silence(self, error: KvStoreError) -> None:
        _LOG.warning("no cache for %d ms: %s", self._address.pause_ms, error)
        self._silent_until_s = time.monotonic() + self._address.pause_ms / 1_000

    def _connected(self) -> Client:
        client = self._client
        if client is not None:
            return client
        with self._connecting:
            if self._closed:
                raise Unreachable("the adapter is closed")
            if self._client is None:
                self._client = Client.connect(
                    self._address.where,
                    namespace=self._namespace,
                    payload_bytes=self.payload_bytes,
                    shares=1,
                    share_domain=self._address.share_domain,
                    name=self._address.name,
                    config=self._address.client,
                    metrics=_metrics(),
                )
            return self._client

    def _check(self, names: Sequence[BlockName], blocks: Sequence[Block]) -> None:
        if len(names) != len(blocks):
            raise BadInput(f"{len(blocks)} blocks for {len(names)} names")
        for block in blocks:
            if (size := sum(piece.size for piece in block)) != self.payload_bytes:
                raise BadInput(f"a block of {size} bytes, not {self.payload_bytes}")


def load_scattered(
    blocks: OpaqueBlocks, names: Sequence[BlockName], into: Sequence[Block]
) -> list[bool]:
    """Load names that need not be a prefix: those that are there; say whose bytes are whole."""
    done = [False] * len(names)
    held = blocks.held(names)
    wanted = [at for at, here in enumerate(held) if here]
    while wanted:
        loaded = leading(blocks.load([names[at] for at in wanted], [into[at] for at in wanted]))
        for at in wanted[:loaded]:
            done[at] = True
        # Behind one that was lost meanwhile, unless the node is: then none came.
        wanted = wanted[loaded + 1 :] if loaded else []
    return done


def leading(held: Sequence[bool]) -> int:
    """Return the number of leading True."""
    return next((at for at, here in enumerate(held) if not here), len(held))


def _held(client: Client, names: Sequence[BlockName], wait_ms: int) -> Held | None:
    got = client.acquire(names, pending_ms=wait_ms or None)
    arrived = 0
    try:
        if got.pending and wait_ms:
            arrived = client.wait_ready(got.pending, deadline_ms=wait_ms)
    except BaseException:
        Held(client, (), got.lease).release()
        raise
    held = Held(client, got.ready + got.pending[:arrived], got.lease)
    if not held.blocks:
        held.release()
        return None
    return held


@lru_cache(maxsize=1)
def adapter_metrics() -> AdapterMetrics:
    """Return the one set of this process: an engine serves the default registry."""
    return AdapterMetrics(REGISTRY)


@lru_cache(maxsize=1)
def _metrics() -> ClientMetrics:
    """Return the one set of this process: an engine serves the default registry."""
    return ClientMetrics(REGISTRY)


def _move(client: Client, ref: SlotRef, block: Block, *, inward: bool) -> None:
    """Copy a block into its slot, padding zeroed, or out of it. Lets other threads run."""
    view = client.view(ref)
    anchor = ctypes.c_char.from_buffer(view)
    at = ctypes.addressof(anchor)
    end = at + len(view)
    for address, size in block:
        ctypes.memmove(*((at, address) if inward else (address, at)), size)
        at += size
    if inward and at < end:  # what an earlier tenant left in the padding goes no further
        ctypes.memset(at, 0, end - at)
