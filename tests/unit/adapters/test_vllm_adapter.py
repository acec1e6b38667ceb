"""What the vLLM adapter decides and converts, without a vLLM."""

import json
from pathlib import Path

import numpy as np
import pytest
from kvworkers.models import digest

from kvstore.adapters.vllm.identity import model_layout, model_namespace, weights_digest
from kvstore.adapters.vllm.pages import EnginePages
from kvstore.adapters.vllm.plan import RequestState, blocks_to_store, patience_ns, usable_hit
from kvstore.adapters.vllm.settings import check_schedule, read_settings
from kvstore.adapters.vllm.versions import check_engine
from kvstore.core.errors import BadInput, Unsupported
from kvstore.core.layout import BlockLayout, Codec

LAYOUT = BlockLayout(layers=2, kv_heads=3, head_dim=8, codec=Codec.RAW32)


def written_as_the_engine_does(tile: int, tokens: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return pages written element by element, and [layer, K or V, token, head, dim]."""
    values = np.arange(2 * 2 * 2 * tokens * 3 * 8, dtype=np.int32)
    values = values.reshape(2, 2, 2 * tokens, 3, 8)
    layers = [np.zeros((2, 3, tokens, 16), dtype=np.int32) for _ in range(2)]
    for layer, pages in enumerate(layers):
        for (token, head, dim), key in np.ndenumerate(values[layer, 0]):
            flat = pages[token // tokens, head].reshape(-1)
            inside = token % tokens
            at = inside * 8 + dim
            if tile > 1:
                at = inside // tile * tile * 8 + dim * tile + inside % tile
            flat[at] = key
            flat[tokens * 8 + inside * 8 + dim] = values[layer, 1, token, head, dim]
    return layers, values


@pytest.mark.parametrize(("tile", "tokens"), [(1, 16), (16, 32), (32, 32), (32, 64), (64, 64)])
def test_pages_become_blocks_of_the_one_layout_and_pages_again(tile: int, tokens: int) -> None:
    layers, values = written_as_the_engine_does(tile, tokens)
    pages = EnginePages(layers, LAYOUT, tile=tile)
    empty = [np.zeros_like(layer) for layer in layers]
    back = EnginePages(empty, LAYOUT, tile=tile)
    for place in range(2 * tokens // 16):
        block = memoryview(bytearray(b"\xff" * LAYOUT.block_bytes))
        pages.store(place // pages.ratio, place % pages.ratio, block)
        got = np.frombuffer(block, np.int32, LAYOUT.payload_bytes // 4).reshape(3, 2, 2, 16, 8)
        expected = values[:, :, place * 16 : place * 16 + 16].transpose(3, 0, 1, 2, 4)
        assert np.array_equal(got, expected)
        assert not any(block[LAYOUT.payload_bytes :]), "the padding of an earlier tenant goes on"
        back.load(block, place // pages.ratio, place % pages.ratio)
    assert all(np.array_equal(a, b) for a, b in zip(empty, layers, strict=True))


@pytest.mark.parametrize(
    ("shape", "tile", "said"),
    [((2, 3, 24, 16), 1, "block_size 24"), ((2, 3, 32, 16), 24, "tiles of 24"),
     ((2, 2, 32, 16), 1, "layer 0")],
)  # fmt: skip
def test_pages_that_do_not_fit_are_refused_by_name(
    shape: tuple[int, ...], tile: int, said: str
) -> None:
    layers = [np.zeros(shape, dtype=np.int32) for _ in range(2)]
    with pytest.raises(Unsupported, match=said):
        EnginePages(layers, LAYOUT, tile=tile)


@pytest.mark.parametrize(
    ("found", "prompt", "local", "least", "tokens"),
    [
        (4, 100, 0, 1, 64),
        (3, 100, 0, 1, 32),  # rounded down to the engine's block
        (4, 64, 0, 1, 32),  # one token is left to compute
        (4, 100, 64, 1, 0),
        (4, 100, 32, 1, 32),
        (4, 100, 32, 33, 0),  # not worth it
        (0, 100, 0, 1, 0),
        (2, 100, 64, 1, 0),
    ],
)
def test_a_hit_is_whole_engine_blocks_past_the_local_one(
    found: int, prompt: int, local: int, least: int, tokens: int
) -> None:
    hit = usable_hit(found, prompt_tokens=prompt, local_tokens=local, block_tokens=32, least=least)
    assert hit == tokens


def test_only_full_blocks_of_known_tokens_are_stored_and_each_once() -> None:
    state = RequestState()
    assert blocks_to_store(state, computed_tokens=70, known_tokens=66, block_tokens=32) == range(2)
    state.stored = 2
    drafted = blocks_to_store(state, computed_tokens=97, known_tokens=95, block_tokens=32)
    assert len(drafted) == 0, "a drafted token may still be rejected"
    late = blocks_to_store(state, computed_tokens=96, known_tokens=96, block_tokens=32)
    assert late == range(2, 3)


@pytest.mark.parametrize(
    ("running", "step_ms", "most_ms"),
    [
        (0, 0, 10),  # nobody is kept waiting
        (1, 16, 2),  # an eighth of what is saved
        (4, 64, 2),
        (1, 1_000, 3),  # answers take about 1 ms: the rest would be a node that hangs
        (64, 20, 0),  # a wait of all of them costs more than one's step
        (1, 2, 0),  # no answer comes that soon
    ],
)
def test_answers_are_awaited_only_where_a_lost_step_costs_more(
    running: int, step_ms: int, most_ms: int
) -> None:
    assert patience_ns(running=running, step_ns=step_ms * 1_000_000) == most_ms * 1_000_000


class TextConfig:
    model_type = "llama"
    num_attention_heads = 9
    num_key_value_heads = 3
    num_hidden_layers = 2
    hidden_size = 72
    max_position_embeddings = 64
    sliding_window: int | None = None

    def __init__(self, rope_type: str = "default") -> None:
        self.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0}


def test_the_namespace_says_what_the_model_is() -> None:
    namespace = model_namespace(TextConfig(), kv_dtype="float32", weights="ab")
    assert model_layout(namespace) == LAYOUT
    other = model_namespace(TextConfig("linear"), kv_dtype="float32", weights="ab")
    assert namespace.digest() != other.digest()


def test_models_that_would_share_wrongly_are_refused() -> None:
    with pytest.raises(Unsupported, match="dynamic"):
        model_namespace(TextConfig("dynamic"), kv_dtype="float32", weights="ab")
    with pytest.raises(Unsupported, match="fp8"):
        model_namespace(TextConfig(), kv_dtype="fp8", weights="ab")
    windowed = TextConfig()
    windowed.sliding_window = 16
    with pytest.raises(Unsupported, match="16 tokens"):
        model_namespace(windowed, kv_dtype="float32", weights="ab")


def test_weights_have_the_digest_that_our_workers_give_them(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.safetensors").write_bytes(b"weights")
    config = {"hidden_size": 72, "torch_dtype": "float32"}
    (model / "config.json").write_text(json.dumps(config))
    ours = weights_digest(str(model), cache=tmp_path / "one")
    assert ours == digest.weights_digest(model, config, cache=tmp_path / "two")
    assert ours == weights_digest(str(model), cache=tmp_path / "one")
    (model / "a.safetensors").write_bytes(b"other weights")
    assert ours != weights_digest(str(model), cache=tmp_path / "one")
    with pytest.raises(BadInput, match="weights_digest"):
        weights_digest("someone/model")


def test_settings_are_checked_by_name() -> None:
    assert read_settings({"run_dir": "/run/kvstore"}).call_ms == 250
    for wrong, said in (
        ({}, "run_dir"),
        ({"run_dir": "x", "calls": 1}, "calls"),
        ({"run_dir": "x", "call_ms": "250"}, "call_ms"),
        ({"run_dir": "x", "max_store_jobs": 0}, "max_store_jobs"),
    ):
        with pytest.raises(BadInput, match=said):
            read_settings(wrong)


def test_steps_planned_ahead_of_a_load_by_layers_are_refused() -> None:
    by_layers = read_settings({"run_dir": "x", "layerwise": True})
    check_schedule(by_layers, ahead=False)
    check_schedule(read_settings({"run_dir": "x"}), ahead=True)
    with pytest.raises(Unsupported, match="--no-async-scheduling"):
        check_schedule(by_layers, ahead=True)


def test_another_minor_release_is_refused_by_name() -> None:
    check_engine("0.32.0+cpu")
    with pytest.raises(Unsupported, match="0\\.33\\.1"):
        check_engine("0.33.1")
