"""The half that lives in vLLM's scheduler: asks the node early, waits only where that is cheaper.

A question is put when a request arrives. Until the answer is there the scheduler is told "ask
again"; at the deadline, or without a node, "nothing". "Ask again" costs a request a step, and where
several arrive together it parts them: each starts when its answer came, and every further step
reads all weights once more. So a short wait for an answer comes first (`patience_ns` says how
long). Nothing here imports vLLM.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvstore.adapters.vllm.block_events import BlockEvents, Placed
from kvstore.adapters.vllm.link import NodeLink
from kvstore.adapters.vllm.plan import (
    LoadJob,
    RequestState,
    StoreJob,
    blocks_to_store,
    patience_ns,
    usable_hit,
)
from kvstore.core.errors import KvStoreError
from kvstore.core.limits import BLOCK_TOKENS, MAX_NAMES_PER_CALL
from kvstore.core.names import BlockName, ExtraKey, chain, pack_tokens
from kvstore.directory.events import TierKind

_log = logging.getLogger(__name__)


class Found(NamedTuple):
    """What the node said about a prompt."""

    names: list[BlockName]
    blocks: int
    """Blocks of 16 from the start that it holds somewhere."""
    tiers: list[TierKind]
    """Of those blocks: the fastest tier that holds each."""


@dataclass(slots=True)
class StepPlan:
    """What the worker is to do in one step."""

    loads: list[LoadJob] = field(default_factory=list)
    stores: list[StoreJob] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    idle: bool = False
    """Nothing is computed in this step: the worker may wait a moment for its loads."""


@dataclass(slots=True)
class _Tracked:
    request: Any
    state: RequestState
    question: "Future[Found] | None"
    found: Found | None = None


class SchedulerSide:
    """Questions, hits and jobs of all requests; every method but `matched` returns at once."""

    def __init__(
        self,
        link: NodeLink,
        *,
        block_tokens: int,
        stores: bool = True,
        events: BlockEvents | None = None,
    ) -> None:
        """`block_tokens` are the engine's; without `stores` only loads are planned.

        `events` hears of what is loaded and stored, where vLLM publishes events.
        """
        self._events = events
        self.counts: Counter[str] = Counter()
        """Since the last `take_counts`."""
        self._link = link
        self._block_tokens = block_tokens
        self._ratio = block_tokens // BLOCK_TOKENS
        self._stores = stores
        self._tracked: dict[str, _Tracked] = {}
        self._loads: list[LoadJob] = []
        self._layerwise = link.settings.layerwise
        self._loading: list[str] = []
        """Requests that load in the step under way, layer by layer."""
        self._running: set[str] = set()
        """Requests that were computed and have not ended: a wait keeps them from going on."""
        self._step_began_ns = self._step_ns = 0
        self._patience_ns = patience_ns(running=0, step_ns=0)
        """What is left of it in this step."""

    def arrived(self, request: Any) -> None:
        """Put the question about a new request, if the node can be asked."""
        began = time.perf_counter_ns()
        if request.request_id not in self._tracked:
            self._tracked[request.request_id] = self._track(request)
        self._spent(began)

    def matched(self, request: Any, local_tokens: int) -> tuple[int | None, bool]:
        """Return (tokens to load, whether before the step), or (None, False) for "ask again".

        May wait for the answer, at most `patience_ns` in all calls of one step.
        """
        self.arrived(request)
        tracked = self._tracked[request.request_id]
        self._await(tracked)
        began = time.perf_counter_ns()
        answer: tuple[int | None, bool] = (0, False)
        if tracked.question is not None and not tracked.question.done():
            answer = (None, False)
        elif (found := self._answer(tracked)) is not None and not tracked.state.gave_up:
            tokens = usable_hit(
                found.blocks,
                prompt_tokens=len(request.prompt_token_ids),
                local_tokens=local_tokens,
                block_tokens=self._block_tokens,
                least=self._link.settings.min_load_tokens,
            )
            tracked.state.asked_from = local_tokens
            answer = (tokens, tokens > 0 and not self._layerwise)
        self._spent(began)
        return answer

    def allocated(self, request: Any, block_ids: Sequence[int], external_tokens: int) -> None:
        """Plan the load of `external_tokens` past the local hit into the blocks given for them."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.found is None or external_tokens <= 0:
            return
        began = time.perf_counter_ns()
        state, ratio = tracked.state, self._ratio
        first = state.asked_from // self._block_tokens
        last = first + external_tokens // self._block_tokens
        job = LoadJob(
            request.request_id,
            tracked.found.names[first * ratio : last * ratio],
            list(block_ids[first:last]),
            first,
        )
        self._placed(request, job.names, range(first, last))
        state.loading = frozenset(job.blocks)
        state.stored = last
        self._loads.append(job)
        self._spent(began)

    def sources(self, request: Any, external_tokens: int) -> dict[TierKind, int]:
        """Return how many of the tokens to load the node said to hold in which tier."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.found is None:
            return {}
        first = tracked.state.asked_from // BLOCK_TOKENS
        tiers = tracked.found.tiers[first : first + external_tokens // BLOCK_TOKENS]
        return {tier: count * BLOCK_TOKENS for tier, count in Counter(tiers).items()}

    def step(
        self,
        progress: Iterable[tuple[str, int]],
        *,
        blocks_of: Any,
        preempted: Iterable[str],
        scheduled_tokens: int,
    ) -> StepPlan:
        """Return what the worker has to do in this step, and forget it.

        `progress` has (request, tokens computed once the step is done); `blocks_of(request)` gives
        the ids of its blocks and is asked only where a block became full.
        """
        began = time.perf_counter_ns()
        plan = StepPlan(idle=scheduled_tokens == 0)
        plan.loads, self._loads = self._loads, []
        if self._layerwise:
            self._loading = [job.request for job in plan.loads]
        for name in preempted:
            if (tracked := self._tracked.get(name)) is not None:
                tracked.state.stored = 0  # what was sent may have been cut off: offered again
                plan.preempted.append(name)
        if self._running:
            self._step_ns = began - self._step_began_ns
        self._step_began_ns = began
        for name, computed in progress:
            self._running.add(name)
            job = self._store(name, computed, blocks_of)
            if job is not None:
                plan.stores.append(job)
        self._patience_ns = patience_ns(running=len(self._running), step_ns=self._step_ns)
        self.counts["steps"] += 1
        self._spent(began)
        return plan

    def loads_ended(self, requests: Iterable[str], bad_blocks: set[int]) -> None:
        """Note which loads ended; a request one of whose blocks is bad does not load again.

        Loads by layers end with their step and are not named.
        """
        by_layers, self._loading = self._loading, []
        for name in (*requests, *by_layers):
            tracked = self._tracked.get(name)
            if tracked is None:
                continue
            bad = tracked.state.loading & bad_blocks
            if bad:
                tracked.state.gave_up = True
                tracked.state.stored = 0
                self.counts["load_failures"] += 1
            tracked.state.loading = frozenset()

    def finished(self, name: str) -> bool:
        """Forget a request; True when the worker was given stores and must tell their end."""
        began = time.perf_counter_ns()
        tracked = self._tracked.pop(name, None)
        self._running.discard(name)
        if not self._running:
            self._patience_ns = patience_ns(running=0, step_ns=0)
        self._loads = [job for job in self._loads if job.request != name]
        self._spent(began)
        return tracked is not None and tracked.state.stores > 0

    def take_counts(self) -> dict[str, int]:
        """Return what was counted since the last time."""
        counts, self.counts = self.counts, Counter()
        return dict(counts)

    def _track(self, request: Any) -> _Tracked:
        self.counts["requests"] += 1
        reason = unserved(request)
        if reason is None and self._link.usable:
            extras = [ExtraKey(0, request.cache_salt.encode())] if request.cache_salt else []
            work = self._ask(request.prompt_token_ids, extras)
            return _Tracked(request, RequestState(), self._link.submit(work))
        self.counts[f"not_asked_{reason or 'node'}"] += 1
        return _Tracked(request, RequestState(), None)

    async def _ask(self, tokens: Sequence[int], extras: list[ExtraKey]) -> Found:
        """Name the prompt's blocks and look them up; runs on the link's loop."""
        client = self._link.client
        assert client is not None
        names = chain(client.root, pack_tokens(tokens), extra_keys=extras)
        most = (len(tokens) - 1) // self._block_tokens * self._ratio
        wanted = names[: min(most, MAX_NAMES_PER_CALL)]
        if not wanted:
            return Found(names, 0, [])
        try:
            looked = await client.lookup(wanted)
        except KvStoreError as error:
            self._link.failed("lookup", error)
            return Found(names, 0, [])
        tiers = [min(places) for places in looked.tiers[: looked.prefix]]
        return Found(names, looked.prefix, tiers)

    def _await(self, tracked: _Tracked) -> None:
        """Wait for an answer as long as this step's patience lasts."""
        question = tracked.question
        if question is None or question.done() or self._patience_ns <= 0:
            return
        began = time.perf_counter_ns()
        wait([question], self._patience_ns / 1e9)
        waited = time.perf_counter_ns() - began
        self._patience_ns -= waited
        self.counts["waited_ns"] += waited

    def _answer(self, tracked: _Tracked) -> Found | None:
        if tracked.question is not None:
            try:
                tracked.found = tracked.question.result(0)
                tracked.state.names = tracked.found.names
                self.counts["lookups"] += 1
                self.counts["lookup_hit_tokens"] += tracked.found.blocks * BLOCK_TOKENS
            except Exception:  # task boundary: a bug of ours must not end the engine
                _log.exception("kvstore: a lookup failed unexpectedly")
                self.counts["unexpected"] += 1
            tracked.question = None
        return tracked.found

    def _store(self, name: str, computed: int, blocks_of: Any) -> StoreJob | None:
        tracked = self._tracked.get(name)
        if not self._stores or tracked is None or tracked.found is None or not self._link.usable:
            return None
        request, state = tracked.request, tracked.state
        outputs = self._link.settings.store_output
        known = len(request.all_token_ids) if outputs else len(request.prompt_token_ids)
        blocks = blocks_to_store(
            state, computed_tokens=computed, known_tokens=known, block_tokens=self._block_tokens
        )
        if not blocks:
            return None
        self._name_up_to(request, state, blocks.stop * self._ratio)
        ids = blocks_of(name)
        state.stored = blocks.stop
        state.stores += 1
        names = state.names[blocks.start * self._ratio : blocks.stop * self._ratio]
        self._placed(request, names, blocks)
        return StoreJob(name, names, list(ids[blocks.start : blocks.stop]), blocks.start)

    def _placed(self, request: Any, names: Sequence[BlockName], blocks: range) -> None:
        if self._events is not None:
            self._events.placed(names, placed(request, blocks, self._block_tokens))

    def _name_up_to(self, request: Any, state: RequestState, count: int) -> None:
        """Name blocks of generated tokens: they go on from the prompt's last full block."""
        have = len(state.names)
        if have >= count:
            return
        tokens = pack_tokens(request.all_token_ids[have * BLOCK_TOKENS : count * BLOCK_TOKENS])
        client = self._link.client
        if have:
            state.names += chain(state.names[-1], tokens)
        elif client is not None:
            salt = [ExtraKey(0, request.cache_salt.encode())] if request.cache_salt else []
            state.names += chain(client.root, tokens, extra_keys=salt)

    def _spent(self, began: int) -> None:
        self.counts["scheduler_ns"] += time.perf_counter_ns() - began


def unserved(request: Any) -> str | None:
    """Return why a request cannot use the store, or None: its tokens must say all about its KV."""
    if request.lora_request is not None:
        return "lora"  # a name says nothing about the adapter's content
    if request.mm_features:
        return "multimodal"
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "embeddings"
    return None


def placed(request: Any, blocks: range, block_tokens: int) -> list[Placed]:
    """Return a request's blocks under the hashes that vLLM gave them."""
    hashes, tokens = request.block_hashes, request.all_token_ids
    return [
        Placed(
            bytes(hashes[at]),
            bytes(hashes[at - 1]) if at else None,
            tuple(tokens[at * block_tokens : (at + 1) * block_tokens]),
            request.cache_salt if not at else None,
        )
        for at in blocks
    ]
