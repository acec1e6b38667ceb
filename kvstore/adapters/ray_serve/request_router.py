"""The class that a Ray Serve deployment names as its `request_router_class`.

Ray makes one for every handle, in the process that sends requests, and asks it to rank replicas.
Whatever goes wrong here, the request is placed as Ray would: two replicas at random.
"""

import asyncio
import logging
import random
import weakref
from collections.abc import Mapping
from typing import Any, Final

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from ray.util.metrics import Counter, Gauge

from kvstore.adapters.prompts import ModelTokenizer, Tokenizer
from kvstore.adapters.ray_serve.exported import Exporter, sink_of
from kvstore.adapters.ray_serve.placer import Replica, ReplicaPlacer
from kvstore.adapters.ray_serve.settings import ServeSettings

_log = logging.getLogger(__name__)
_EXPORT_S: Final = 2.0
"""Between two exports of the router's metrics: below any scrape's interval."""
_PROMPTS: Final = ("messages", "prompt", "input")
_STATS: Final = "kv_event_metadata"
"""Under which a replica's `record_routing_stats` tells where its engine publishes."""


class KvStoreRequestRouter(RequestRouter):  # type: ignore[misc]  # untyped here
    """Sends requests where their prefix is, or is being computed."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Take `request_router_kwargs`; raises `BadInput` naming what is wrong with them."""
        self._kv_settings = ServeSettings.of(kwargs)
        path = self._kv_settings.tokenizer
        self._kv_tokenizer: Tokenizer | None = ModelTokenizer(path) if path is not None else None
        self._kv_placer: ReplicaPlacer | None = None
        self._kv_choices = Counter(
            "kvstore_serve_choices",
            "Requests by how their replica was found: placed by the router, or as Ray does because"
            " no replica is followed yet (unknown) or the router failed (failed)",
            tag_keys=("application", "deployment", "outcome"),
        )
        self._kv_tags = {
            "application": self._deployment_id.app_name, "deployment": self._deployment_id.name,
        }  # fmt: skip
        self._kv_choices.set_default_tags(self._kv_tags)
        self._kv_export_failures = Counter(
            "kvstore_serve_export_failures",
            "Times the router's metrics could not be given on to Ray's; the log has why",
            tag_keys=("application", "deployment"),
        )
        self._kv_export_failures.set_default_tags(self._kv_tags)
        self._kv_exports: asyncio.Task[None] | None = None

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take Ray's list, and follow the new ones at once where a loop is running."""
        super().update_replicas(replicas)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return  # the first request does it
        self._followed()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas in the order in which they should be tried."""
        if not candidate_replicas:
            return []
        if pending_request is None:
            return [_two_of(candidate_replicas)]
        pending_request.routing_context.should_backoff = True
        by_name = {one.replica_id.to_full_id_str(): one for one in candidate_replicas}
        try:
            ranked = await self._followed().place(
                pending_request.metadata.internal_request_id,
                _body_of(pending_request),
                by_name.keys(),
            )
            outcome = "placed" if ranked else "unknown"
        except Exception:  # task boundary: Ray would leave the request hanging
            _log.exception("placing a request failed")
            ranked, outcome = [], "failed"
        self._kv_choices.inc(tags={"outcome": outcome})
        chosen = [by_name[name] for name in ranked]
        others = [one for one in candidate_replicas if one not in chosen]
        return [*([one] for one in chosen), *([_two_of(others)] if others else [])]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Note where a request went."""
        if self._kv_placer is not None:
            request = pending_request.metadata.internal_request_id
            self._kv_placer.routed(request, replica_id.to_full_id_str())

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Note that a request ended."""
        if self._kv_placer is not None:
            self._kv_placer.completed(internal_request_id, replica_id.to_full_id_str())

    def _followed(self) -> ReplicaPlacer:
        """Return the placer, made on the loop that routes, told of today's replicas."""
        if self._kv_placer is None:
            self._kv_placer = ReplicaPlacer(self._kv_settings, self._kv_tokenizer)
            exporter = Exporter(self._kv_placer.registry, sink_of(Counter, Gauge, self._kv_tags))
            # Kept: a task that nobody holds may be collected while it runs.
            self._kv_exports = asyncio.get_running_loop().create_task(
                _export(weakref.ref(self), self._kv_placer, exporter, self._kv_export_failures)
            )
        self._kv_placer.set_replicas(
            [_replica(one, self._kv_settings) for one in self._replicas_list]
        )
        return self._kv_placer


async def _export(
    router: "weakref.ref[KvStoreRequestRouter]",
    placer: ReplicaPlacer,
    exporter: Exporter,
    failures: Counter,
) -> None:
    """Give the router's metrics on to Ray's until its handle drops it; then stop following.

    Ray tells nobody when it drops a router.
    """
    while router() is not None:
        try:
            exporter.export()
        except Exception:  # task boundary: metrics must not end the placing of requests
            _log.exception("giving metrics on to Ray failed")
            failures.inc()
        await asyncio.sleep(_EXPORT_S)
    await placer.close()


def _replica(replica: RunningReplica, settings: ServeSettings) -> Replica:
    """Return what the placer needs of a replica: its own word on events, or the deployment's."""
    name, host = replica.replica_id.to_full_id_str(), replica._replica_info.node_ip or ""
    told = replica.routing_stats.get(_STATS)
    if isinstance(told, Mapping) and isinstance(told.get("endpoint"), str):
        return Replica(name, host, told["endpoint"], str(told.get("replay_endpoint") or ""))
    return Replica(
        name, host, settings.events.replace("{host}", host), settings.replay.replace("{host}", host)
    )


def _body_of(pending: PendingRequest) -> Mapping[str, Any] | None:
    """Return a call's argument that is a request of the OpenAI API: a mapping or a model of one."""
    for one in (*pending.args, *pending.kwargs.values()):
        if isinstance(one, Mapping) and any(name in one for name in _PROMPTS):
            return one
        dump = getattr(one, "model_dump", None)
        if dump is not None and any(hasattr(one, name) for name in _PROMPTS):
            body: Mapping[str, Any] = dump(exclude_none=True)
            return body
    return None


def _two_of(replicas: list[RunningReplica]) -> list[RunningReplica]:
    return random.sample(replicas, min(2, len(replicas)))
