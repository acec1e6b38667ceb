"""How much KV a model needs, what fits a GPU, and when loading beats computing. Pure.

    KV bytes of a request = 2 · L · H_kv · d · S · P     full attention, by the table of formats
                            2 · L · H_kv · d · min(S, window) · P                        sliding
                            L · (latent + rope) · S · P                                    MLA
                            L · state                                whatever the length: SSM
    batch B multiplies all of it

Full and sliding layers are sized with `kvstore.core.layout`, the same table the store uses, so the
4 KiB padding of blocks is part of the figure. FLOPs of prefill follow the usual count: two per
active weight and token, and 4 · H · d · p per layer for the token at position p (products of
queries with keys and of probabilities with values).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import BlockLayout, Codec, LatentLayout, round_up
from kvstore.core.limits import BLOCK_TOKENS, GRANULE_BYTES
from kvstore.core.model_shape import LayerGroup, LayerKind, ModelShape

FIDELITY_CODECS: Final[Mapping[str, Codec]] = {
    "exact": Codec.RAW16,
    "fp8": Codec.FP8,
    "int8": Codec.INT8,
    "int4": Codec.INT4,
}
"""A namespace's fidelity and how it is stored (DESIGN D3); `exact` is bf16 or fp16."""

_MLA_SCALE_VALUES: Final = 128
"""Latent elements that share one f32 scale in fp8 MLA caches (FlashMLA's layout: 656 B a token)."""


def group_bytes(group: LayerGroup, codec: Codec, tokens: int, *, ranks: int = 1) -> int:
    """Return the bytes one GPU keeps of one request of `tokens` tokens in these layers.

    `ranks` is the tensor-parallel degree: KV heads are divided among ranks and repeated when
    there are fewer; an MLA latent is repeated on every rank. Raises `Unsupported` for a codec
    that has no form for the kind.
    """
    assert tokens >= 0 and ranks >= 1
    if group.kind is LayerKind.STATE:
        return -(-group.layers * group.state_bytes // ranks)
    kept = min(tokens, group.window_tokens) if group.kind is LayerKind.SLIDING else tokens
    blocks = -(-kept // BLOCK_TOKENS)
    return blocks * _block_bytes(group, codec, ranks)


def _block_bytes(group: LayerGroup, codec: Codec, ranks: int) -> int:
    if group.kind is LayerKind.LATENT:
        if codec is Codec.RAW16:
            return LatentLayout(
                layers=group.layers,
                latent_dim=group.latent_values - group.rope_values,
                rope_dim=group.rope_values,
            ).block_bytes
        cell = BLOCK_TOKENS * _latent_token_bytes(group, codec)
        return round_up(group.layers * cell, GRANULE_BYTES)
    heads = -(-group.kv_heads // ranks)
    return BlockLayout(
        layers=group.layers, kv_heads=heads, head_dim=group.head_dim, codec=codec
    ).block_bytes


def _latent_token_bytes(group: LayerGroup, codec: Codec) -> int:
    """Return the bytes of a quantised token in one MLA layer; rotary values stay in 16 bits."""
    if codec in (Codec.FP8, Codec.INT8):
        latent = group.latent_values - group.rope_values
        return latent + 4 * -(-latent // _MLA_SCALE_VALUES) + 2 * group.rope_values
    raise Unsupported(f"MLA latents have no {codec.name.lower()} form")


def request_bytes(model: ModelShape, codec: Codec, tokens: int, *, ranks: int = 1) -> int:
    """Return the bytes one GPU of `ranks` keeps of one request of `tokens` tokens."""
    return sum(group_bytes(group, codec, tokens, ranks=ranks) for group in model.groups)


def token_bytes(model: ModelShape, codec: Codec) -> float:
    """Return the bytes one more token costs inside every window, padding of blocks included."""
    growing = (g for g in model.groups if g.kind is not LayerKind.STATE)
    return sum(_block_bytes(group, codec, 1) for group in growing) / BLOCK_TOKENS


def unwindowed_token_bytes(model: ModelShape, codec: Codec) -> float:
    """Return the bytes one more token costs once it is beyond every sliding window."""
    kinds = (LayerKind.FULL, LayerKind.LATENT)
    return sum(_block_bytes(g, codec, 1) for g in model.groups if g.kind in kinds) / BLOCK_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Memory of one tensor-parallel group, per GPU."""

    gpu_bytes: int
    ranks: int
    usable: float
    """Share of memory left after the runtime, activations and graphs."""
    weight_bytes: float
    """Bytes per weight: 2 for bf16, 1 for fp8, about 0.55 for int4 with scales."""

    def __post_init__(self) -> None:
        if not 0 < self.usable <= 1:
            raise BadInput(f"the usable share of GPU memory must be in (0, 1], got {self.usable}")
        if self.ranks < 1:
            raise BadInput(f"a tensor-parallel degree of {self.ranks}")

    def weights(self, model: ModelShape) -> float:
        """Return the bytes of weights on one GPU."""
        return model.parameters * self.weight_bytes / self.ranks

    def for_kv(self, model: ModelShape) -> int:
        """Return the bytes left for KV on one GPU; 0 when the weights do not fit."""
        return max(0, int(self.gpu_bytes * self.usable - self.weights(model)))


def max_batch(model: ModelShape, codec: Codec, budget: Budget, tokens: int) -> int:
    """Return how many requests of `tokens` tokens fit beside the weights."""
    each = request_bytes(model, codec, tokens, ranks=budget.ranks)
    return budget.for_kv(model) // each if each else 0


def max_context(model: ModelShape, codec: Codec, budget: Budget, users: int, limit: int) -> int:
    """Return the longest context, in whole blocks up to `limit` tokens, that `users` can share."""
    low, high = 0, limit // BLOCK_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        needed = users * request_bytes(model, codec, middle * BLOCK_TOKENS, ranks=budget.ranks)
        low, high = (middle, high) if needed <= budget.for_kv(model) else (low, middle - 1)
    return low * BLOCK_TOKENS


def crossover_tokens(model: ModelShape, codec: Codec, weight_bytes: float) -> int | None:
    """Return the tokens in flight whose KV weighs as much as the weights; None: it never does.

    Counted for contexts beyond every window, where only full and latent layers grow.
    """
    each = unwindowed_token_bytes(model, codec)
    return int(model.parameters * weight_bytes / each) if each else None


def prefill_seconds(model: ModelShape, tokens: int, position: int, flops: float) -> float:
    """Return the seconds to compute `tokens` tokens that start at `position`, at `flops` FLOP/s."""
    assert flops > 0
    linear = 2 * model.active_parameters * tokens
    before, after = (_attention_flops(model, end) for end in (position, position + tokens))
    return (linear + after - before) / flops


def _attention_flops(model: ModelShape, tokens: int) -> float:
    """Return the FLOPs of attention of the first `tokens` tokens."""
    total = 0.0
    for group in model.groups:
        if group.kind is LayerKind.STATE:
            continue
        window = group.window_tokens or tokens
        inside = min(tokens, window)
        seen = inside * inside / 2 + max(0, tokens - window) * window
        total += 4 * group.layers * model.query_heads * model.attention_dim * seen
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """Loading a prefix from one tier against computing it again."""

    tier: str
    bytes_per_s: float
    load_s: float
    recompute_s: float
    wins_from_tokens: int | None
    """Shortest prefix, in whole blocks, that loads no slower than it computes; None: none does."""

    @property
    def sooner(self) -> float:
        """How many times sooner loading is."""
        return self.recompute_s / self.load_s if self.load_s else 0.0


def break_even(
    model: ModelShape,
    codec: Codec,
    *,
    tier: str,
    bytes_per_s: float,
    fixed_s: float,
    tokens: int,
    flops: float,
) -> BreakEven:
    """Compare loading and computing a prefix of `tokens` tokens.

    `fixed_s` is what a load costs before its first byte. Loading is linear in length and computing
    grows faster than that, so once loading wins it keeps winning.
    """
    if bytes_per_s <= 0:
        raise BadInput(f"tier {tier}: bandwidth must be above 0, got {bytes_per_s}")

    def load(length: int) -> float:
        return fixed_s + request_bytes(model, codec, length) / bytes_per_s

    low, high = 1, max(1, tokens // BLOCK_TOKENS)
    while low < high:
        middle = (low + high) // 2
        length = middle * BLOCK_TOKENS
        wins = load(length) <= prefill_seconds(model, length, 0, flops)
        low, high = (low, middle) if wins else (middle + 1, high)
    first = low * BLOCK_TOKENS
    wins = load(first) <= prefill_seconds(model, first, 0, flops)
    return BreakEven(
        tier=tier,
        bytes_per_s=bytes_per_s,
        load_s=load(tokens),
        recompute_s=prefill_seconds(model, tokens, 0, flops),
        wins_from_tokens=first if wins else None,
    )
