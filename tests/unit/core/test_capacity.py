"""Sizes, batches and break-even points against published figures and hand calculations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.capacity import (
    Budget,
    break_even,
    crossover_tokens,
    group_bytes,
    max_batch,
    max_context,
    prefill_seconds,
    request_bytes,
    token_bytes,
    unwindowed_token_bytes,
)
from kvstore.core.catalogue import GPUS, MODELS
from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import Codec, kv_bytes_per_token
from kvstore.core.model_shape import LayerGroup, LayerKind, ModelShape, read_config

GIB = 1 << 30
K = 1024


def shape(name: str) -> ModelShape:
    return read_config(name, MODELS[name])


@pytest.mark.parametrize(
    ("tokens", "gib"), [(4 * K, 1.25), (32 * K, 10), (128 * K, 40), (1000 * K, 312.5)]
)
def test_llama_70b_needs_what_is_published(tokens: int, gib: float) -> None:
    llama = shape("llama-3-70b")
    assert token_bytes(llama, Codec.RAW16) == 327_680 == 2 * 80 * 8 * 128 * 2
    assert request_bytes(llama, Codec.RAW16, tokens) == gib * GIB
    assert 32 * request_bytes(llama, Codec.RAW16, tokens) == 32 * gib * GIB


def test_deepseek_keeps_576_values_per_token_and_layer() -> None:
    deepseek = shape("deepseek-v3")
    (group,) = deepseek.groups
    assert (group.latent_values, group.layers) == (576, 61)
    assert 61 * 576 * 2 == 70_272
    assert 70_272 <= token_bytes(deepseek, Codec.RAW16) <= 70_272 * 1.004  # padded to 4 KiB
    # A rank keeps the whole latent, however many ranks there are.
    one, eight = (request_bytes(deepseek, Codec.RAW16, 4096, ranks=n) for n in (1, 8))
    assert one == eight


def test_mistral_shares_heads_four_ways_and_forgets_beyond_its_window() -> None:
    mistral = shape("mistral-7b")
    assert mistral.grouping == 4
    unshared = kv_bytes_per_token(layers=32, kv_heads=32, head_dim=128, element_bytes=2)
    assert token_bytes(mistral, Codec.RAW16) * 4 == unshared
    assert request_bytes(mistral, Codec.RAW16, 4096) == GIB // 2
    assert request_bytes(mistral, Codec.RAW16, 1_000_000) == GIB // 2
    assert unwindowed_token_bytes(mistral, Codec.RAW16) == 0
    assert crossover_tokens(mistral, Codec.RAW16, 2.0) is None


def test_a_hybrid_pays_its_state_once() -> None:
    hybrid = shape("qwen3-next-80b")
    full, state = hybrid.groups
    assert (full.kind, state.kind) == (LayerKind.FULL, LayerKind.STATE)
    assert state.state_bytes == 4 * 32 * 128 * 128 + 2 * 3 * (2 * 16 * 128 + 32 * 128)
    short, long = (request_bytes(hybrid, Codec.RAW16, n) for n in (16, 1600))
    assert long - short == 99 * 16 * kv_bytes_per_token(
        layers=12, kv_heads=2, head_dim=256, element_bytes=2
    )
    assert short > 36 * state.state_bytes
    assert group_bytes(state, Codec.RAW16, 5, ranks=2) == 18 * state.state_bytes


@pytest.mark.parametrize(
    ("codec", "cell"),
    [(Codec.RAW16, 8192), (Codec.FP8, 4224), (Codec.INT8, 4224), (Codec.INT4, 2176)],
)  # fmt: skip
def test_quantised_forms_have_the_sizes_of_the_table(codec: Codec, cell: int) -> None:
    assert token_bytes(shape("llama-3-8b"), codec) == 8 * 32 * cell / 16


def test_a_quantised_latent_keeps_its_rotary_part() -> None:
    group = LayerGroup(kind=LayerKind.LATENT, layers=61, latent_values=576, rope_values=64)
    assert group_bytes(group, Codec.FP8, 16) == 157 * 4096  # 61 * 16 * 656 B, padded
    with pytest.raises(Unsupported, match="int4"):
        group_bytes(group, Codec.INT4, 16)


def test_heads_are_repeated_when_ranks_are_more() -> None:
    llama = shape("llama-3-70b")
    whole = request_bytes(llama, Codec.RAW16, 4096)
    assert request_bytes(llama, Codec.RAW16, 4096, ranks=4) * 4 == whole
    assert request_bytes(llama, Codec.RAW16, 4096, ranks=16) * 8 == whole


def _budget(ranks: int = 1, usable: float = 0.9) -> Budget:
    return Budget(gpu_bytes=GPUS["h100"].memory_bytes, ranks=ranks, usable=usable, weight_bytes=2.0)


def test_what_does_not_fit_is_nothing() -> None:
    llama = shape("llama-3-70b")
    assert _budget().for_kv(llama) == 0
    assert max_batch(llama, Codec.RAW16, _budget(), 4096) == 0
    assert max_context(llama, Codec.RAW16, _budget(), 1, 1 << 20) == 0


@given(users=st.integers(1, 64), tokens=st.integers(16, 1 << 17))
def test_batch_and_context_agree(users: int, tokens: int) -> None:
    """The longest context of `users` fits them, and a block more does not."""
    llama, budget = shape("llama-3-8b"), _budget()
    longest = max_context(llama, Codec.RAW16, budget, users, 1 << 24)
    assert max_batch(llama, Codec.RAW16, budget, longest) >= users
    assert max_batch(llama, Codec.RAW16, budget, longest + 16) < users
    batch = max_batch(llama, Codec.RAW16, budget, tokens)
    free = budget.for_kv(llama) - batch * request_bytes(llama, Codec.RAW16, tokens)
    assert 0 <= free < request_bytes(llama, Codec.RAW16, tokens)


@pytest.mark.parametrize(("ranks", "usable"), [(0, 0.9), (1, 0.0), (1, 1.5)])
def test_an_impossible_budget_is_named(ranks: int, usable: float) -> None:
    with pytest.raises(BadInput, match=r"degree|usable"):
        _budget(ranks, usable)


def test_the_crossover_weighs_both_sides() -> None:
    llama = shape("llama-3-70b")
    tokens = crossover_tokens(llama, Codec.RAW16, 2.0)
    assert tokens is not None
    assert tokens * 327_680 == pytest.approx(llama.parameters * 2, rel=1e-5)


def test_prefill_adds_up_and_grows_with_position() -> None:
    for name in MODELS:
        model = shape(name)
        first, second = (prefill_seconds(model, 8192, p, 5e14) for p in (0, 8192))
        assert first + second == pytest.approx(prefill_seconds(model, 16_384, 0, 5e14))
        assert second >= first
    llama = shape("llama-3-8b")
    exact = 2 * llama.parameters * 8192 + 4 * 32 * 32 * 128 * 8192**2 / 2
    assert prefill_seconds(llama, 8192, 0, 5e14) == pytest.approx(exact / 5e14)


@given(
    gb_per_s=st.floats(0.05, 500), fixed_ms=st.floats(0, 200), blocks=st.integers(1, 4096),
    name=st.sampled_from(sorted(MODELS)),
)  # fmt: skip
def test_loading_wins_from_the_break_even_on(
    gb_per_s: float, fixed_ms: float, blocks: int, name: str
) -> None:
    model, flops = shape(name), 4e14
    found = break_even(
        model, Codec.RAW16, tier="nvme", bytes_per_s=gb_per_s * 1e9, fixed_s=fixed_ms / 1e3,
        tokens=blocks * 16, flops=flops,
    )  # fmt: skip
    assert (found.sooner >= 1) == (found.wins_from_tokens is not None)
    if found.wins_from_tokens is not None and found.wins_from_tokens > 16:
        shorter = break_even(
            model, Codec.RAW16, tier="nvme", bytes_per_s=gb_per_s * 1e9, fixed_s=fixed_ms / 1e3,
            tokens=found.wins_from_tokens - 16, flops=flops,
        )  # fmt: skip
        assert shorter.wins_from_tokens is None


def test_a_tier_without_bandwidth_is_named() -> None:
    with pytest.raises(BadInput, match="files"):
        break_even(
            shape("llama-3-8b"), Codec.RAW16, tier="files", bytes_per_s=0, fixed_s=0, tokens=16,
            flops=1e14,
        )  # fmt: skip
