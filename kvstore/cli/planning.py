"""Puts the answers of one capacity plan together. Pure; `kvstore.cli.plan` reads the flags."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from kvstore.core.capacity import (
    FIDELITY_CODECS,
    BreakEven,
    Budget,
    break_even,
    crossover_tokens,
    max_batch,
    max_context,
    request_bytes,
    token_bytes,
    unwindowed_token_bytes,
)
from kvstore.core.catalogue import Gpu
from kvstore.core.model_shape import ModelShape
from kvstore.core.money import Prices, gpus_month, memory_month, worth_holding_s

MAX_CONTEXT_TOKENS: Final = 16 << 20
"""Longest context looked at: 16 times today's longest."""

_HOST_GB_PER_S: Final = {"nvme": 6.0, "peer": 11.0, "files": 2.0}
"""Where nothing measured is given: one PCIe 4 drive, 100 Gbit/s Ethernet, a file server."""

_FIRST_BYTE_S: Final = {"dram": 0.0005, "nvme": 0.001, "peer": 0.001, "files": 0.005}
"""What a load costs before its first byte: the calls, a seek, a round trip."""


TIERS: Final = tuple(_FIRST_BYTE_S)
"""What can be loaded from, nearest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One plan to make, whatever the context length."""

    model: ModelShape
    users: int
    gpu_name: str
    gpu: Gpu
    budget: Budget
    fidelity: str
    mfu: float
    bandwidths: Mapping[str, float]
    """GB/s by tier where the caller measured them."""
    prices: Prices

    @property
    def flops(self) -> float:
        """FLOP/s that prefill reaches on all ranks together."""
        return self.gpu.flops * self.mfu * self.budget.ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class TierAnswer:
    """What one tier is worth for a prefix of the whole context."""

    tier: str
    gb_per_s: float
    load_s: float
    sooner: float
    wins_from_tokens: int | None
    worth_holding_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answers for one context length."""

    model: str
    fidelity: str
    gpu: str
    gpus: int
    context_tokens: int
    users: int
    bytes_per_token: float
    bytes_per_token_beyond_window: float
    bytes_per_request: int
    bytes_total: int
    weights_bytes: int
    crossover_tokens: int | None
    """Tokens in flight whose KV weighs as much as the weights."""
    kv_bytes_per_gpu: int
    """Memory left for KV on one GPU."""
    max_batch: int
    max_context_tokens: int
    gpus_for_users: int | None
    """GPUs that hold every user's KV at once; None where not even one request fits."""
    recompute_s: float
    tiers: tuple[TierAnswer, ...]
    money_month: Mapping[str, float]
    """By what is paid for; only what has a price."""

    def as_row(self) -> dict[str, Any]:
        """Return the JSON object of DESIGN §8."""
        return asdict(self)


def answer(question: Question, tokens: int) -> Plan:
    """Answer `question` for requests of `tokens` tokens."""
    model, budget = question.model, question.budget
    codec = FIDELITY_CODECS[question.fidelity]
    each = request_bytes(model, codec, tokens)
    batch = max_batch(model, codec, budget, tokens)
    groups = -(-question.users // batch) if batch else None
    gpus = None if groups is None else groups * budget.ranks
    breaks = [_break_even(question, tier, tokens) for tier in TIERS]
    return Plan(
        model=model.name,
        fidelity=question.fidelity,
        gpu=question.gpu_name,
        gpus=budget.ranks,
        context_tokens=tokens,
        users=question.users,
        bytes_per_token=token_bytes(model, codec),
        bytes_per_token_beyond_window=unwindowed_token_bytes(model, codec),
        bytes_per_request=each,
        bytes_total=each * question.users,
        weights_bytes=int(model.parameters * budget.weight_bytes),
        crossover_tokens=crossover_tokens(model, codec, budget.weight_bytes),
        kv_bytes_per_gpu=budget.for_kv(model),
        max_batch=batch,
        max_context_tokens=max_context(model, codec, budget, question.users, MAX_CONTEXT_TOKENS),
        gpus_for_users=gpus,
        recompute_s=breaks[0].recompute_s,
        tiers=tuple(_tier_answer(question, each, found) for found in breaks),
        money_month=_money(question.prices, gpus, each * question.users),
    )


def tier_bandwidth(question: Question, tier: str) -> float:
    """Return the bytes a second that a group of GPUs reads from a tier."""
    measured = question.bandwidths.get(tier)
    if tier == "dram":
        per_gpu = question.gpu.host_bytes_per_s if measured is None else measured * 1e9
        return per_gpu * question.budget.ranks
    return (_HOST_GB_PER_S[tier] if measured is None else measured) * 1e9


def _break_even(question: Question, tier: str, tokens: int) -> BreakEven:
    return break_even(
        question.model,
        FIDELITY_CODECS[question.fidelity],
        tier=tier,
        bytes_per_s=tier_bandwidth(question, tier),
        fixed_s=_FIRST_BYTE_S[tier],
        tokens=tokens,
        flops=question.flops,
    )


def _tier_answer(question: Question, size: int, found: BreakEven) -> TierAnswer:
    prices = question.prices
    return TierAnswer(
        tier=found.tier,
        gb_per_s=found.bytes_per_s / 1e9,
        load_s=found.load_s,
        sooner=found.sooner,
        wins_from_tokens=found.wins_from_tokens,
        worth_holding_s=worth_holding_s(
            recompute_gpu_s=found.recompute_s * question.budget.ranks,
            size=size,
            gpu_hour=prices.gpu_hour,
            gib_month=prices.per_gib_month(found.tier),
        ),
    )


def _money(prices: Prices, gpus: int | None, kv_bytes: int) -> dict[str, float]:
    """Return the monthly cost of the GPUs, and of holding all users' KV in each priced tier."""
    costs = {
        "gpus": None if gpus is None else gpus_month(prices.gpu_hour, gpus),
        "kv_in_dram": memory_month(prices.dram_gib_month, kv_bytes),
        "kv_in_nvme": memory_month(prices.nvme_gib_month, kv_bytes),
    }
    return {what: cost for what, cost in costs.items() if cost is not None}
