"""How many pages a worker gets."""

import pytest
from kvworkers.models.loading import LoadedModel, load_model
from kvworkers.pages.sizing import CPU_PAGES_BYTES, fit_pages, new_pages

from kvstore.core.errors import BadInput
from tests.tiny_model import tiny_model


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(tiny_model(), threads=1)


def test_pages_are_as_many_as_the_bytes_hold(model: LoadedModel) -> None:
    block = model.spec.layout.block_bytes
    pages = new_pages(model, 7 * block + 1, step_tokens=64, batch=4)
    assert pages.count == 7 and pages.memory.shape == (7, block)
    assert pages.view.data_ptr() == pages.memory.data_ptr()
    assert model.graphs is None, "a CPU captures nothing"


def test_less_than_a_page_is_refused_by_name(model: LoadedModel) -> None:
    with pytest.raises(BadInput, match="pool_bytes 5"):
        new_pages(model, 5, step_tokens=64, batch=4)


def test_a_cpu_has_its_default(model: LoadedModel) -> None:
    fitting = fit_pages(model, step_tokens=64)
    assert fitting == CPU_PAGES_BYTES // model.spec.layout.block_bytes
