"""Ranks a deployment's replicas for a request by our router. Knows nothing of Ray.

A booking is made with the ranking and freed when Ray says that the request ended. First tokens are
not seen from here: a prompt leaves its replica's queue when the answer was predicted to begin.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry

from kvstore.adapters.placing import prompt_to_place, root_of
from kvstore.adapters.prompts import PromptReader, Tokenizer
from kvstore.adapters.ray_serve.assumed import AssumedSource
from kvstore.adapters.ray_serve.settings import ServeSettings
from kvstore.core.errors import BadInput, KvStoreError, Refused
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.members import Member, Members
from kvstore.router.placement import Decision, Prompt
from kvstore.router.router import Router
from kvstore.router.source import EventSource
from kvstore.router.watch_source import WatchSource

MAX_PLACED: Final = 1 << 14
"""Requests whose end is waited for; older ones' bookings expire by themselves."""


class Replica(NamedTuple):
    """What Ray says about one replica."""

    name: str
    host: str = ""
    """Address of its node."""
    events: str = ""
    """Where its engine publishes KV events; empty: it does not."""
    replay: str = ""


@dataclass(frozen=True, slots=True)
class _Placed:
    prompt: Prompt
    decision: Decision


class ReplicaPlacer:
    """Of one deployment and one event loop."""

    def __init__(self, settings: ServeSettings, tokenizer: Tokenizer | None = None) -> None:
        self._settings = settings
        self._reader = PromptReader(tokenizer)
        self.registry = CollectorRegistry()
        """What the router counts; nobody serves it here."""
        self._metrics = RouterMetrics(self.registry)
        self._replicas: dict[str, Replica] = {}
        self._assumed: dict[str, AssumedSource] = {}
        self._placed: OrderedDict[str, _Placed] = OrderedDict()
        self._moves: set[asyncio.Task[None]] = set()
        self._router = Router(metrics=self._metrics, source=self._source)

    async def close(self) -> None:
        """Stop following."""
        for move in self._moves:
            move.cancel()
        await self._router.close()

    def set_replicas(self, replicas: Sequence[Replica]) -> None:
        """Follow these and no others; cheap where nothing changed."""
        listed = {replica.name: replica for replica in replicas}
        if listed == self._replicas:
            return
        for name in [n for n, old in self._replicas.items() if listed.get(n) != old]:
            self._assumed.pop(name, None)
        self._replicas = listed
        # Nobody dials these addresses: Ray sends the request itself.
        workers = [
            Member("worker", one.name, one.events or f"ray:{one.name}", one.host)
            for one in replicas
        ]
        self._router.set_members(Members.of([*workers, *self._settings.nodes]))

    async def place(
        self, request: str, body: Mapping[str, Any] | None, among: Collection[str]
    ) -> list[str]:
        """Return replicas, best first, and book the request at the first; none: no opinion.

        Asked again for a request (every replica was full), the booking before is freed.
        """
        self._free(request)
        reading = await self._reader.read(body) if body is not None else None
        root = self._settings.root
        if reading is not None:
            root = root_of(root, reading, self._settings.base_models)
        prompt = prompt_to_place(self._router, root, reading, among=frozenset(among))
        try:
            decision = await self._router.route(prompt, wait_ms=0, deadline_ms=0)
        except Refused:
            return []
        self._keep(request, prompt, decision)
        return [score.name for score in decision.scores]

    def routed(self, request: str, replica: str) -> None:
        """Note where a request went in the end: the best one may have been full."""
        placed = self._placed.get(request)
        if placed is None or placed.decision.worker == replica:
            return
        move = asyncio.get_running_loop().create_task(self._move(request, placed, replica))
        self._moves.add(move)
        move.add_done_callback(self._moves.discard)

    def completed(self, request: str, replica: str) -> None:
        """Free the booking: the request ended, and the replica has computed its prompt."""
        placed = self._placed.get(request)
        if placed is not None:
            source = self._assumed.get(replica)
            if source is not None:
                source.assume(placed.prompt.root, placed.prompt.names)
            self._free(request)

    def live(self) -> int:
        """Return how many replicas are followed at this moment."""
        return sum(self._router.health(name) == "live" for name in self._replicas)

    def blocks(self) -> int:
        """Return how many blocks are known somewhere."""
        return self._router.view_blocks

    async def _move(self, request: str, placed: _Placed, replica: str) -> None:
        """Book a request where it went, in place of where it should have gone."""
        self._free(request)
        prompt = replace(placed.prompt, among=frozenset({replica}))
        try:
            decision = await self._router.route(prompt, wait_ms=0, deadline_ms=0)
        except KvStoreError:
            return  # it is gone already: nothing to book
        self._keep(request, prompt, decision)

    def _keep(self, request: str, prompt: Prompt, decision: Decision) -> None:
        self._placed[request] = _Placed(prompt, decision)
        if len(self._placed) > MAX_PLACED:
            self._free(next(iter(self._placed)))
        soon_s = min(decision.predicted_ttft_ms / 1_000, 60.0)
        loop = asyncio.get_running_loop()
        loop.call_later(soon_s, self._router.first_token, decision.booking, None)

    def _free(self, request: str) -> None:
        placed = self._placed.pop(request, None)
        if placed is not None:
            self._router.complete(placed.decision.booking)

    def _source(self, member: Member) -> EventSource:
        if member.kind == "node":
            return WatchSource(member)
        replica = self._replicas[member.name]
        if replica.events:
            return _engine_source(replica, self._settings, self._metrics)
        source = AssumedSource(member.name, max_blocks=self._settings.assumed_blocks)
        return self._assumed.setdefault(member.name, source)


def _engine_source(
    replica: Replica, settings: ServeSettings, metrics: RouterMetrics
) -> EventSource:
    try:
        from kvstore.router.vllm_source import VllmConfig, VllmSource
    except ModuleNotFoundError as error:
        raise BadInput(
            f"KV events need a package that is not installed ({error.name}): "
            "pip install kvstore-llm[vllm]"
        ) from None
    config = VllmConfig(
        endpoint=replica.events, replay=replica.replay, root=settings.root, hashes=settings.hashes
    )
    return VllmSource(replica.name, config, metrics)
