"""The class that vLLM loads: `kv_connector_module_path: kvstore.adapters.vllm.connector`.

Thin on purpose: it turns vLLM's objects into plain ones for `scheduler_side` and `worker_side`.
"""

# vLLM lives in another environment than the tools that read this.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore.adapters.vllm.block_events import BlockEvents
from kvstore.adapters.vllm.engine_events import engine_events
from kvstore.adapters.vllm.engine_pages import engine_pages
from kvstore.adapters.vllm.identity import model_layout, model_namespace, weights_digest
from kvstore.adapters.vllm.link import NodeLink
from kvstore.adapters.vllm.scheduler_side import SchedulerSide, StepPlan
from kvstore.adapters.vllm.settings import check_schedule, read_settings
from kvstore.adapters.vllm.stats import KvStoreProm, KvStoreStats
from kvstore.adapters.vllm.versions import check_engine
from kvstore.adapters.vllm.worker_side import WorkerSide
from kvstore.core.errors import Unsupported
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.directory.events import TierKind

check_engine(vllm.__version__)

_REST_S: Final = 0.002
"""How long a step that computes nothing waits for a load or store: the engine would spin."""
_SOURCES: Final = {TierKind.DRAM: CacheHitSource.HOST, TierKind.NVME: CacheHitSource.DISK}


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """The per-step message from the scheduler to the worker."""

    plan: StepPlan = field(default_factory=StepPlan)


class KvStoreConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """vLLM's KV cache over the host's cache node; see docs/engines/vllm.md."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = read_settings(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._layerwise = settings.layerwise
        self._block_tokens = _check(vllm_config, kv_cache_config)
        check_schedule(settings, ahead=bool(vllm_config.scheduler_config.async_scheduling))
        model = vllm_config.model_config
        namespace = model_namespace(
            model.hf_text_config,
            kv_dtype=str(model.dtype).removeprefix("torch."),
            weights=settings.weights_digest or weights_digest(model.model),
        )
        self._layout = model_layout(namespace)
        self._link = NodeLink(settings, namespace, self._layout, name=role.name.lower())
        self._failures: Counter[str] = Counter()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._layers: dict[str, int] = {}
        """Layers by vLLM's names, where loads go by layers."""
        self._events: BlockEvents | None = None
        if role is KVConnectorRole.SCHEDULER:
            told = vllm_config.kv_events_config
            if told is not None and told.enable_kv_cache_events:
                parts = self._block_tokens // BLOCK_TOKENS
                self._events = BlockEvents(self._link.publisher, parts=parts)
            self._scheduler = SchedulerSide(
                self._link,
                block_tokens=self._block_tokens,
                stores=vllm_config.kv_transfer_config.is_kv_producer,
                events=self._events,
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a store that was dropped is a later miss."""
        return False

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the engine's pages; raises `Unsupported` for a layout that is not served."""
        self._worker = WorkerSide(self._link, engine_pages(kv_caches, self._layout))
        if self._layerwise:
            self._layers = {name: layer for layer, name in enumerate(kv_caches)}

    def handle_preemptions(self, kv_connector_metadata: StepMetadata) -> None:
        """Cut off stores of requests whose blocks this step may overwrite."""
        self._there().preempted(kv_connector_metadata.plan.preempted)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin this step's loads in the background."""
        if self._layerwise:
            self._there().load_by_layers(self._plan().loads)
            return
        for job in self._plan().loads:
            self._there().load(job)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for the layer where loads go by layers; else a request runs after its whole load."""
        if self._layerwise:
            self._there().wait_for_layer(self._layers[layer_name])

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: blocks are stored whole, after the step."""

    def wait_for_save(self) -> None:
        """Queue this step's stores; their blocks are kept until they are told as finished."""
        plan = self._plan()
        if self._layerwise and not self._there().end_layers():
            self._there().drop(plan.stores)
            return
        for job in plan.stores:
            self._there().store(job)
        if plan.idle:
            self._there().rest(_REST_S)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return (requests whose stores ended, requests whose loads ended)."""
        return self._there().ended(finished_req_ids)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that have to be computed after all."""
        return self._there().bad_blocks()

    def shutdown(self) -> None:
        """End the session with the node and all threads."""
        if self._events is not None:
            self._events.close()
        self._link.close()
        if self._worker is not None:
            self._worker.close()

    # Scheduler

    def on_new_request(self, request: Any) -> None:
        """Put the question about the request's prefix now: the answer is there when it is due."""
        self._asked().arrived(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return what can be loaded past the local hit; (None, False) while not known."""
        return self._asked().matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load into the blocks that were allocated for it."""
        if num_external_tokens:
            self._asked().allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[Any, int]:
        """Return the tokens of a hit by vLLM's names of the tiers."""
        by_source: Counter[Any] = Counter()
        for tier, tokens in self._asked().sources(request, num_external_tokens).items():
            by_source[_SOURCES.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)] += tokens
        return dict(by_source)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """Return this step's loads and stores for the worker."""
        plan = self._asked().step(
            _progress(scheduler_output),
            blocks_of=lambda name: self._kv_cache_manager.get_block_ids(name)[0],
            preempted=scheduler_output.preempted_req_ids or (),
            scheduled_tokens=scheduler_output.total_num_scheduled_tokens,
        )
        return StepMetadata(plan)

    def update_connector_output(self, connector_output: Any) -> None:
        """Learn which loads ended and which of their blocks are bad."""
        self._asked().loads_ended(
            connector_output.finished_recving or (), connector_output.invalid_block_ids or set()
        )

    def take_events(self) -> list[Any]:
        """Return what vLLM publishes of blocks that came into the node or went from it."""
        return [] if self._events is None else engine_events(self._events.take())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """Say whether the request's blocks must be kept until its stores ended."""
        return self._asked().finished(request.request_id), None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, None]:
        """As `request_finished`: one group is served."""
        return self._asked().finished(request.request_id), None

    # Both

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether graphs have to end between layers: where the forward waits for each."""
        return bool(extra_config.get("layerwise", False))

    def get_kv_connector_stats(self) -> KvStoreStats | None:
        """Return what was counted since the last time."""
        if self._worker is not None:
            counts = self._worker.take_counts()
        else:
            counts = dict(self._asked().take_counts())
        failures = Counter(self._link.failures)
        if new := (failures - self._failures).total():
            counts["node_failures"] = new
        self._failures = failures
        return KvStoreStats(counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvStoreStats:
        """Return stats over `data`."""
        return KvStoreStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any, **named: Any) -> KvStoreProm:
        """Return the connector's families for vLLM's Prometheus page."""
        return KvStoreProm(*arguments, *named.values())

    def _plan(self) -> StepPlan:
        plan: StepPlan = self._get_connector_metadata().plan
        return plan

    def _asked(self) -> SchedulerSide:
        assert self._scheduler is not None, "called on a worker's connector"
        return self._scheduler

    def _there(self) -> WorkerSide:
        assert self._worker is not None, "called before register_kv_caches"
        return self._worker


def _progress(scheduler_output: Any) -> Iterator[tuple[str, int]]:
    """Yield (request, tokens that are computed once this step is done)."""
    scheduled = scheduler_output.num_scheduled_tokens
    for new in scheduler_output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens + scheduled[new.req_id]
    cached = scheduler_output.scheduled_cached_reqs
    for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        yield name, computed + scheduled[name]


def _check(vllm_config: Any, kv_cache_config: Any) -> int:
    """Return the engine's tokens per block; raises `Unsupported` naming what is not served."""
    parallel = vllm_config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, name) != 1:
            raise Unsupported(f"{name} {getattr(parallel, name)}: 1 is served yet")
    if vllm_config.cache_config.cache_dtype not in ("auto", str(vllm_config.model_config.dtype)):
        raise Unsupported(
            f"kv_cache_dtype {vllm_config.cache_config.cache_dtype}: 'auto' is served"
        )
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise Unsupported(
            f"{len(groups)} groups of layers: models with one kind of layer are served"
        )
    block_tokens = int(groups[0].kv_cache_spec.block_size)
    if block_tokens % BLOCK_TOKENS:
        raise Unsupported(f"block_size {block_tokens} is not a multiple of {BLOCK_TOKENS}")
    return block_tokens
