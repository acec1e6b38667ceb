"""A ragged batch over pages equals transformers' own forward, for several architectures."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kvworkers.models import LoadedModel, load_model
from kvworkers.models.attention import IMPLEMENTATION
from safetensors.torch import load_file, save_file

from kvstore.core.errors import BadInput, Unsupported
from tests.model_fixture import TINY, make_step, plain_model, poisoned_pages, write_tiny_model
from tests.patience import PATIENCE_S

PROMPT = torch.randint(0, 199, (150,), generator=torch.Generator().manual_seed(5)).tolist()
OTHER = torch.randint(0, 199, (40,), generator=torch.Generator().manual_seed(6)).tolist()


@pytest.fixture(scope="module", params=sorted(TINY))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LoadedModel, Any]]:
    path = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", request.param)
    threads = torch.get_num_threads()
    yield load_model(path, threads=1, cache_dir=path.parent), plain_model(path)
    torch.set_num_threads(threads)


def _plain(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def test_chunks_and_ragged_batches_give_the_plain_forwards_logits(
    pair: tuple[LoadedModel, Any],
) -> None:
    model, plain = pair
    wanted, other = _plain(plain, PROMPT), _plain(plain, OTHER)
    pages = poisoned_pages(model, 20)
    mine, theirs = [7, 2, 15, 4, 9, 11, 0, 3, 18, 19], [5, 12, 1]
    first = model.forward(make_step((PROMPT[:50], 0, mine), sample=[0, 17, 49]), pages)
    assert first.dtype == torch.float32 and first.shape == (3, 199)
    both = model.forward(make_step((PROMPT[50:149], 50, mine), (OTHER[:39], 0, theirs)), pages)
    last = model.forward(make_step((OTHER[39:], 39, theirs), (PROMPT[149:], 149, mine)), pages)
    for got, expected in (
        (first, wanted[[0, 17, 49]]),
        (both, torch.stack([wanted[148], other[38]])),
        (last, torch.stack([other[39], wanted[149]])),
    ):
        assert float((got - expected).abs().max()) < 1e-4


def test_pages_moved_elsewhere_serve_as_the_prefix_of_another_pool(
    pair: tuple[LoadedModel, Any],
) -> None:
    model, plain = pair
    pool = model.new_pool(4)
    model.forward(make_step((PROMPT[:64], 0, [3, 1, 0, 2])), model.page_view(pool))
    elsewhere = model.new_pool(6)
    elsewhere[[5, 4, 2]] = pool[[3, 1, 0]]
    got = model.forward(make_step((PROMPT[48:64], 48, [5, 4, 2, 0])), model.page_view(elsewhere))
    assert float((got[0] - _plain(plain, PROMPT[:64])[63]).abs().max()) < 1e-4


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path / "tiny"), cache_dir=tmp_path)


def test_a_step_may_sample_nothing(model: LoadedModel) -> None:
    pages = poisoned_pages(model, 2)
    assert model.forward(make_step((PROMPT[:20], 0, [0, 1]), sample=[]), pages).shape == (0, 199)


def test_a_step_that_does_not_fit_is_refused_before_any_page_changes(model: LoadedModel) -> None:
    pages = poisoned_pages(model, 2)
    with pytest.raises(BadInput, match="slots"):
        model.forward(make_step((PROMPT[:40], 0, [0, 1, 2])), pages)
    assert pages.isnan().all()


def test_two_models_in_two_threads_keep_their_steps_apart(tmp_path: Path) -> None:
    paths = [write_tiny_model(tmp_path / f"model-{seed}", seed=seed) for seed in (1, 2)]
    models = [load_model(path, cache_dir=tmp_path) for path in paths]
    prompts = [PROMPT[:60], OTHER[:23]]
    wanted = [_plain(plain_model(path), p)[-1] for path, p in zip(paths, prompts, strict=True)]
    worst = [0.0, 0.0]

    def work(index: int) -> None:
        pages = poisoned_pages(models[index], 4)
        for _ in range(10):
            got = models[index].forward(make_step((prompts[index], 0, [2, 0, 3, 1])), pages)
            worst[index] = max(worst[index], float((got[0] - wanted[index]).abs().max()))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert max(worst) < 1e-4 and worst[0] > 0


def test_weights_are_loaded_in_the_type_that_the_spec_says(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny", dtype="bfloat16")
    loaded = load_model(path, cache_dir=tmp_path)
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    assert loaded.module.config._attn_implementation == IMPLEMENTATION
    assert not any(p.requires_grad for p in loaded.module.parameters())


def test_bad_calls_name_what_is_wrong(tmp_path: Path, model: LoadedModel) -> None:
    with pytest.raises(Unsupported, match="meta"):
        load_model(model.spec.path, device="meta", cache_dir=tmp_path)
    with pytest.raises(BadInput, match="threads"):
        load_model(model.spec.path, threads=0, cache_dir=tmp_path)
    with pytest.raises(BadInput, match="page"):
        model.new_pool(0)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(BadInput, match="tiny"):
        load_model(path, cache_dir=tmp_path)


def test_weights_that_lack_a_tensor_are_refused_rather_than_made_up(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny")
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.up_proj"):
        load_model(path, cache_dir=tmp_path)
