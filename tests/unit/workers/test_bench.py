"""What needs no GPU of the worker's benchmark: rows, sizes, and pages named together."""

from typing import Any

import pytest
import torch
from click.testing import CliRunner
from kvworkers.bench.cases import READ_GB_S
from kvworkers.bench.command import worker
from kvworkers.bench.hidden import Window, hidden
from kvworkers.models.random_weights import random_model
from kvworkers.pages.pool import PageKey, PagePool
from kvworkers.pages.sizing import CPU_PAGES_BYTES, fit_pages

from kvstore.core.errors import BadInput
from kvstore.core.names import BlockName, Root
from kvstore.directory.lru import Lru

ROOT = Root(bytes(32))


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(BadInput, match="no-such"):
        random_model("no-such", device="cpu")


def test_help_names_the_shapes() -> None:
    said = CliRunner().invoke(worker, ["--help"])
    assert said.exit_code == 0 and "llama-3.1-8b" in said.output.replace("\n", "")
    assert READ_GB_S > 1_000


def test_pages_of_a_cpu_are_bounded() -> None:
    class Model:
        page_bytes = 1 << 20
        device = torch.device("cpu")

    model: Any = Model()
    assert fit_pages(model, step_tokens=64) == CPU_PAGES_BYTES >> 20


def test_what_of_a_load_others_did_not_pay_for_is_hidden() -> None:
    alone, hit = Window(0.3, 300, 1_000.0), Window(0.3, 280, 1_000.0)
    assert alone.lost_s == 0 and abs(hit.lost_s - 0.02) < 1e-9
    assert hidden([hit, hit], [hit, hit], 0.2) == 1, "all that they lost is the hit's own step"
    halved = Window(0.3, 230, 1_000.0)
    assert abs(hidden([halved], [hit], 0.1) - 0.5) < 1e-9
    assert abs(hidden([Window(0.3, 180, 1_000.0)], [hit], 0.1)) < 1e-9, "it stopped them all along"


class Counting(Lru):
    def __init__(self) -> None:
        super().__init__()
        self.inserts: list[int] = []

    def insert(self, blocks: Any, **options: Any) -> None:
        self.inserts.append(len(blocks))
        super().insert(blocks, **options)


def test_blocks_of_a_prompt_are_named_together_around_a_taken_one() -> None:
    policy = Counting()
    pool = PagePool(16, block_bytes=64, policy=policy)
    keys = [PageKey(ROOT, BlockName(bytes([n]) * 32)) for n in range(6)]
    taken = pool.allocate(1, now_ms=0.0)
    pages = pool.allocate(6, now_ms=0.0)
    assert taken is not None and pages is not None
    assert pool.publish(taken[0], keys[2], position=2, now_ms=0.0)
    policy.inserts.clear()
    assert pool.publish_run(pages, keys, position=0, now_ms=1.0) == 5
    assert policy.inserts == [2, 3], "one call for each unbroken run"
    pool.check()
