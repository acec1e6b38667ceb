"""Both halves of the vLLM adapter over pages of numpy, driven as vLLM's own would drive them."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvstore import Namespace
from kvstore.adapters.vllm.block_events import BlockEvents
from kvstore.adapters.vllm.link import NodeLink
from kvstore.adapters.vllm.pages import EnginePages
from kvstore.adapters.vllm.scheduler_side import SchedulerSide, StepPlan
from kvstore.adapters.vllm.settings import Settings
from kvstore.adapters.vllm.worker_side import WorkerSide
from kvstore.core.layout import BlockLayout, Codec
from tests.patience import PATIENCE_MS, until_so

LAYOUT = BlockLayout(layers=2, kv_heads=3, head_dim=8, codec=Codec.RAW32)
MODEL = Namespace(weights_digest="w", kv_dtype="float32", layers=2, kv_heads=3, head_dim=8)
PROMPT = list(range(100))
BLOCK = 32
"""Tokens in an engine's block."""


@dataclass
class Request:
    """The parts of vLLM's request that the adapter reads."""

    request_id: str
    prompt_token_ids: list[int] = field(default_factory=lambda: list(PROMPT))
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: Any = None
    prompt_embeds: Any = None
    block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        whole = len(self.prompt_token_ids) // BLOCK * BLOCK
        for end in range(BLOCK, whole + 1, BLOCK):
            said = repr((self.cache_salt, self.prompt_token_ids[:end])).encode()
            self.block_hashes.append(hashlib.sha256(said).digest())

    @property
    def all_token_ids(self) -> list[int]:
        return self.prompt_token_ids


class Engine:
    """One engine's two halves over pages of its own."""

    def __init__(
        self,
        run_dir: str,
        seed: int,
        *,
        stores: bool = True,
        events: bool = False,
        patience_ms: int = PATIENCE_MS,
        **more: Any,
    ) -> None:
        dice = np.random.default_rng(seed)
        self.layers = [dice.integers(0, 1 << 30, (8, 3, 32, 16), np.int32) for _ in range(2)]
        settings = Settings(
            run_dir=run_dir, call_ms=patience_ms, load_ms=patience_ms, circuit_ms=200, **more
        )
        self.link = NodeLink(settings, MODEL, LAYOUT, name="test")
        self.events = BlockEvents(self.link.publisher, parts=BLOCK // 16) if events else None
        self.scheduler = SchedulerSide(
            self.link, block_tokens=BLOCK, stores=stores, events=self.events
        )
        self.worker = WorkerSide(self.link, EnginePages(self.layers, LAYOUT, tile=32))

    def step(self, progress: list[tuple[str, int]], blocks: list[int]) -> StepPlan:
        plan = self.scheduler.step(
            progress, blocks_of=lambda _: blocks, preempted=(), scheduled_tokens=len(progress)
        )
        self.worker.preempted(plan.preempted)
        for load in plan.loads:
            self.worker.load(load)
        for store in plan.stores:
            self.worker.store(store)
        return plan

    def matched(self, request: Request) -> int:
        answers: list[int | None] = []

        def answered() -> bool:
            answers.append(self.scheduler.matched(request, 0)[0])
            return answers[-1] is not None

        until_so(answered)
        assert answers[-1] is not None
        return answers[-1]

    def compute_and_store(self, name: str, blocks: list[int]) -> None:
        self.matched(Request(name))
        self.step([(name, 100)], blocks)
        if self.scheduler.finished(name):
            until_so(lambda: name in self.worker.ended({name})[0])

    def load(self, request: Request, blocks: list[int]) -> set[int]:
        """Load what was found; return the engine's blocks that could not be loaded."""
        tokens = self.matched(request)
        self.scheduler.allocated(request, blocks, tokens)
        self.step([], blocks)
        until_so(lambda: request.request_id in self.worker.ended(set())[1])
        bad = self.worker.bad_blocks()
        self.scheduler.loads_ended([request.request_id], bad)
        return bad

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
        self.link.close()
        self.worker.close()
