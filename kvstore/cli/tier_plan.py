"""Which tiers a trace's hit rate needs: the simulator's own tiers, searched by size. Pure.

One number is searched, the blocks below HBM: DRAM takes them up to what the host has, NVMe the
rest. HBM is what the weights leave. Every size that is looked at is one replay of the trace,
remembered: targets share them, and the plot shows them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from typing import Any, Final

from kvstore.cli.planning import Question, tier_bandwidth
from kvstore.core.capacity import FIDELITY_CODECS, prefill_seconds, request_bytes
from kvstore.core.errors import BadInput
from kvstore.core.money import memory_month
from kvstore.directory.policies import make_policy
from kvstore.simulate.hierarchy import Shape
from kvstore.simulate.prices import Prices as ReplayPrices
from kvstore.simulate.tiers import TiersResult, replay_tiers
from kvstore.simulate.trace import Trace

STEPS_PER_OCTAVE: Final = 4
"""Sizes looked at lie a factor of 1.19 apart: the answer is that coarse."""

OCTAVES: Final = 10
"""The smallest size but one is a thousandth of the trace's blocks."""

COARSE_STEPS: Final = 8
"""Every eighth size is looked at whatever the targets are, for the plot."""

SHARES_OF_CEILING: Final = (0.5, 0.8, 0.95)
"""Targets where none is given: shares of what an endless cache would hit."""

_FIT_TOKENS: Final = 32_768
_NEVER_DOUBLES: Final = 1e15
"""Tokens after which attention doubles a token's cost, for models without attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What serves the trace: copies of the model on one host, and the host's memory."""

    copies: int
    dram_bytes: int
    """At most; what is needed beyond it is put on NVMe."""
    policy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """One size below HBM, and what the trace makes of it."""

    below_bytes: int
    dram_bytes: int
    nvme_bytes: int
    result: TiersResult


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPlan:
    """The smallest tiers that reach one target; the largest where none does."""

    trace: str
    model: str
    target: float
    reached: bool
    hit_rate: float
    """Share of prompt tokens loaded instead of computed, 0 to 1."""
    hit: Mapping[str, float]
    """The same by tier."""
    declined: float
    """Share of tokens that were cached and cheaper to compute."""
    hbm_bytes: int
    dram_bytes: int
    nvme_bytes: int
    compute_s: float
    """Prefill of the whole trace without a cache."""
    saved_s: float
    money_month: Mapping[str, float]

    def as_row(self) -> dict[str, Any]:
        """Return the JSON object."""
        return asdict(self) | {"hit": dict(self.hit)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceAnswer:
    """Everything about one trace."""

    trace: Trace
    unique_bytes: int
    hbm_bytes: int
    ceiling: float
    """Hit rate of tiers that hold everything."""
    plans: tuple[TierPlan, ...]
    looked_at: tuple[Sized, ...]
    """By size, smallest first."""


def _ignore(what: str) -> None:
    """Take no note."""


def plan_tiers(
    question: Question,
    machine: Machine,
    trace: Trace,
    targets: Sequence[float],
    *,
    on_replay: Callable[[str], None] = _ignore,
    on_request: Callable[[], None] | None = None,
) -> TraceAnswer:
    """Return the tiers that `trace` needs for each target.

    Raises `BadInput` where the GPUs have no room for the longest prompt: they could not serve it.
    `on_replay` is told of each replay before it begins, `on_request` of each request in it.
    """
    search = _Search(question, machine, trace, on_replay, on_request)
    top = len(search.sizes) - 1
    for step in (*range(0, top, COARSE_STEPS), top):
        search.at(step)
    ceiling = search.at(top).result.token_hit
    wanted = targets or [round(share * ceiling, 4) for share in SHARES_OF_CEILING]
    plans = tuple(search.plan(target) for target in wanted)
    return TraceAnswer(
        trace=trace,
        unique_bytes=trace.unique_blocks * search.block_bytes,
        hbm_bytes=search.hbm_bytes,
        ceiling=ceiling,
        plans=plans,
        looked_at=tuple(search.known[step] for step in sorted(search.known)),
    )


def sizes(unique_blocks: int) -> list[int]:
    """Return blocks below HBM to look at: one, which is next to nothing, and a geometric scale."""
    steps = OCTAVES * STEPS_PER_OCTAVE
    scale = (round(unique_blocks * 2 ** (-at / STEPS_PER_OCTAVE)) for at in range(steps + 1))
    return sorted({1, unique_blocks, *(size for size in scale if size > 1)})


class _Search:
    """Replays sizes, each once."""

    def __init__(
        self,
        question: Question,
        machine: Machine,
        trace: Trace,
        on_replay: Callable[[str], None],
        on_request: Callable[[], None] | None,
    ) -> None:
        self._question = question
        self._machine = machine
        self._trace = trace
        self._on_replay = on_replay
        self._on_request = on_request
        model, codec = question.model, FIDELITY_CODECS[question.fidelity]
        self.block_bytes = request_bytes(model, codec, trace.block_tokens)
        ranks = question.budget.ranks
        on_one_gpu = request_bytes(model, codec, trace.block_tokens, ranks=ranks)
        self._hbm_blocks = question.budget.for_kv(model) // on_one_gpu
        longest = max(len(request.blocks) for request in trace.requests)
        if self._hbm_blocks < longest:
            raise BadInput(
                f"--gpus {ranks}: the longest prompt of {trace.name} needs"
                f" {longest * self.block_bytes} bytes of KV; beside the weights of {model.name}"
                f" {ranks} x {question.gpu_name} have {self._hbm_blocks * self.block_bytes}"
            )
        self.hbm_bytes = self._hbm_blocks * self.block_bytes * machine.copies
        self._dram_blocks = max(1, machine.dram_bytes // self.block_bytes)
        self._prices = replay_prices(question, ceil(self.block_bytes / trace.block_tokens))
        self.sizes = sizes(trace.unique_blocks)
        self.known: dict[int, Sized] = {}

    def at(self, step: int) -> Sized:
        """Return what the trace makes of a size; replays it where that is not known."""
        if step not in self.known:
            self._on_replay(f"{self._trace.name}, size {len(self.known) + 1}")
            self.known[step] = self._replayed(self.sizes[step])
        return self.known[step]

    def plan(self, target: float) -> TierPlan:
        """Return the smallest size that reaches `target`, the largest where none does."""
        low, high = 0, len(self.sizes) - 1
        while low < high:
            middle = (low + high) // 2
            reaches = self.at(middle).result.token_hit >= target
            low, high = (low, middle) if reaches else (middle + 1, high)
        found = self.at(low)
        dram = found.dram_bytes if low else 0  # one block is none: the simulator wants one
        prices = self._question.prices
        costs = {
            "dram": memory_month(prices.dram_gib_month, dram),
            "nvme": memory_month(prices.nvme_gib_month, found.nvme_bytes),
        }
        return TierPlan(
            trace=self._trace.name,
            model=self._question.model.name,
            target=target,
            reached=found.result.token_hit >= target,
            hit_rate=found.result.token_hit,
            hit=found.result.hit,
            declined=found.result.declined,
            hbm_bytes=self.hbm_bytes,
            dram_bytes=dram,
            nvme_bytes=found.nvme_bytes,
            compute_s=found.result.compute_s,
            saved_s=found.result.saved_s,
            money_month={what: cost for what, cost in costs.items() if cost is not None},
        )

    def _replayed(self, blocks: int) -> Sized:
        dram = min(blocks, self._dram_blocks)
        nvme = blocks - dram
        if nvme and blocks == self._trace.unique_blocks:
            # The disk keeps its copy of what is promoted: to hold everything takes all of it there.
            nvme = blocks
        shape = Shape(
            workers=self._machine.copies,
            hbm_blocks=self._hbm_blocks,
            dram_blocks=dram,
            nvme_blocks=nvme,
        )
        make = partial(make_policy, self._machine.policy)
        return Sized(
            below_bytes=blocks * self.block_bytes,
            dram_bytes=dram * self.block_bytes,
            nvme_bytes=nvme * self.block_bytes,
            result=replay_tiers(
                self._trace, shape, make, self._prices, on_request=self._on_request
            ),
        )


def replay_prices(question: Question, bytes_per_token: int) -> ReplayPrices:
    """Return what the simulator pays for computing and loading, from the plan's own figures."""
    model, flops = question.model, question.flops
    whole = prefill_seconds(model, _FIT_TOKENS, 0, flops)
    linear = 2 * model.active_parameters / flops
    attention = whole - linear * _FIT_TOKENS
    # The square term k of k·n²/2 seconds: a token at position linear / k costs twice the first.
    doubling = linear * _FIT_TOKENS**2 / (2 * attention) if attention > 0 else _NEVER_DOUBLES
    return ReplayPrices(
        bytes_per_token=bytes_per_token,
        prefill_tokens_per_s=1 / linear,
        doubling_tokens=doubling,
        dram_gb_per_s=tier_bandwidth(question, "dram") / 1e9,
        nvme_gb_per_s=tier_bandwidth(question, "nvme") / 1e9,
        peer_gb_per_s=tier_bandwidth(question, "peer") / 1e9,
        pool_gb_per_s=tier_bandwidth(question, "files") / 1e9,
    )
