"""The class that vLLM's tiered offloading loads: docs/engines/vllm.md has the command line."""

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import vllm  # pyright: ignore[reportMissingImports]
from vllm.v1.kv_offload.base import (  # pyright: ignore[reportMissingImports]
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import (  # pyright: ignore[reportMissingImports]
    JobResult,
    SecondaryTierManager,
)

from kvstore.adapters.opaque import OpaqueBlocks, Piece
from kvstore.adapters.vllm.tier_events import TierEvents
from kvstore.adapters.vllm.tier_jobs import TierJobs
from kvstore.adapters.vllm.tier_settings import read_tier_settings, tier_namespace
from kvstore.adapters.vllm.versions import check_engine


class KvStoreTier(SecondaryTierManager):  # type: ignore[misc]  # untyped where not installed
    """vLLM's chunks in a kvstore node of this host, behind its own CPU tier.

    Runs in the scheduler: every method but `drain_jobs` and `shutdown` returns at once.
    """

    medium: ClassVar[Any] = Medium.CPU

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **said: Any,
    ) -> None:
        """`said` is the tier's entry; raises `BadInput` naming a setting at fault."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        check_engine(str(vllm.__version__))  # pyright: ignore[reportAttributeAccessIssue]
        settings = read_tier_settings(said)
        # Addresses are valid as long as vLLM's view is, which the base class keeps.
        self._base = int(np.asarray(primary_kv_view).ctypes.data)
        self._row_bytes = self._block_size_bytes
        namespace = tier_namespace(offloading_spec.config, settings, self._row_bytes)
        blocks = OpaqueBlocks(settings.address, namespace, self._row_bytes)
        blocks.connect()
        wanted = offloading_spec.kv_events_config.enable_kv_cache_events
        events = TierEvents(blocks.publisher) if wanted else None
        self._jobs = TierJobs(blocks, threads=settings.threads, events=events)

    def on_new_request(self, req_context: Any) -> Any:
        """Take new chunks only: what was found came from here or is here already."""
        return RequestOffloadingContext()

    def lookup(self, key: bytes, req_context: Any) -> Any:
        """Say HIT or MISS, or RETRY until the node has answered."""
        here = self._jobs.verdict(req_context.req_id, bytes(key))
        if here is None:
            return LookupResult.RETRY
        return LookupResult.HIT if here else LookupResult.MISS

    def on_schedule_end(self, context: Any) -> None:
        """Put this step's lookups to the node, all at once."""
        self._jobs.ask()

    def submit_store(self, job_metadata: Any) -> None:
        """Copy chunks into the node, in the background."""
        keys = [bytes(key) for key in job_metadata.keys]
        self._jobs.store(job_metadata.job_id, keys, self._chunks(job_metadata.chunk_ids))

    def submit_load(self, job_metadata: Any) -> None:
        """Copy chunks out of the node, in the background."""
        keys = [bytes(key) for key in job_metadata.keys]
        request = job_metadata.req_context.req_id
        self._jobs.load(job_metadata.job_id, request, keys, self._chunks(job_metadata.chunk_ids))

    def get_finished_jobs(self) -> Iterable[Any]:
        """Return the jobs that ended, each once."""
        return [
            JobResult(
                job_id=done.job,
                success=done.whole,
                successful_keys=done.keys if done.keys and not done.whole else None,
                transfer_time=done.seconds,
                transfer_bytes=done.moved_bytes,
            )
            for done in self._jobs.finished()
        ]

    def take_events(self) -> Iterable[Any]:
        """Return what the node holds of ours since the last time, and what no longer."""
        return [
            OffloadingEvent(
                keys=list(told.keys),
                medium=self.medium,
                removed=told.removed,
                locality=Locality.LOCAL,
                ownership=self.tier_type,
                removal_expected=True,
            )
            for told in self._jobs.told()
        ]

    def has_pending_work(self) -> bool:
        """Ask to be called while something is under way."""
        return self._jobs.pending()

    def on_request_finished(self, req_context: Any) -> None:
        """Forget what was found for a request."""
        self._jobs.forget(req_context.req_id)

    def drain_jobs(self) -> None:
        """Wait until nothing touches the CPU tier's memory."""
        self._jobs.drain()

    def shutdown(self) -> None:
        """Wait for what runs and end the session."""
        self._jobs.close()

    def _chunks(self, chunk_ids: Any) -> list[list[Piece]]:
        size = self._row_bytes
        return [[Piece(self._base + int(chunk) * size, size)] for chunk in chunk_ids]
