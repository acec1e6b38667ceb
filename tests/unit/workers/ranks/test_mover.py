"""Every rank copies its bytes of the same blocks: together they make what one worker makes."""

import asyncio
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from kvworkers.models.loading import LoadedModel, load_model
from kvworkers.models.sharding import Part
from kvworkers.ranks.lead import Lead
from kvworkers.ranks.mover import PartMover, RanksMover
from kvworkers.stream.gate import Gate
from kvworkers.stream.mover import Mover
from torch import Tensor

from kvstore.core.errors import Unreachable
from kvstore.core.names import Fidelity
from tests.model_fixture import write_tiny_model
from tests.patience import until

BLOCKS = 5


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def load(path: Path, part: Part, fidelity: Fidelity) -> LoadedModel:
    return load_model(path, cache_dir=path.parent, part=part, fidelity=fidelity)


def parts_of(model: LoadedModel, pages: Tensor, rank: int) -> Tensor:
    size = model.spec.layout.payload_bytes // 2
    return pages[:, rank * size : (rank + 1) * size].contiguous()


@pytest.mark.parametrize(
    ("fidelity", "raw"),
    [(Fidelity.EXACT, False), (Fidelity.INT8, False), (Fidelity.INT8, True)],
)
async def test_ranks_write_and_read_what_a_whole_worker_does(
    path: Path, fidelity: Fidelity, raw: bool
) -> None:
    """Also pages as they are, of those that make way, where blocks are kept smaller."""
    whole = load(path, Part(), fidelity)
    form = whole.forms.pages if raw else whole.forms.stored
    stored = form.block_bytes
    pages = whole.new_pool(BLOCKS)
    torch.manual_seed(3)
    whole.page_view(pages).normal_()
    # As long as the last block: a copy that went a padding too far would be refused.
    together, alone = (memoryview(bytearray(BLOCKS * stored)) for _ in range(2))
    offsets, rows = [place * stored for place in (4, 0, 2)], [1, 3, 0]
    mover = Mover(pages, whole.forms)
    await mover.store(rows, alone, offsets, raw=raw)
    movers = []
    for rank in range(2):
        model = load(path, Part(rank, 2), fidelity)
        memory = parts_of(whole, pages, rank)
        assert memory.shape[1] == model.page_bytes
        movers.append(PartMover(memory, model))
    for part in movers:
        await part.move(together, offsets, rows, store=True, alone=False, raw=raw)
    payload = form.payload_bytes
    for offset in offsets:
        assert together[offset : offset + payload] == alone[offset : offset + payload]
    back = whole.new_pool(BLOCKS)
    await Mover(back, whole.forms).load(together, offsets, [2, 1, 0], raw=raw)
    for rank in range(2):
        model = load(path, Part(rank, 2), fidelity)
        mine = model.new_pool(BLOCKS)
        await PartMover(mine, model).move(
            alone, offsets, [2, 1, 0], store=False, alone=True, raw=raw
        )
        assert bool((mine == parts_of(whole, back, rank)).all())
    mover.close()


class Told(Lead):
    """A lead whose ranks answer when a test does."""

    def __init__(self) -> None:
        super().__init__({}, None, torch.device("cpu"), deadline_s=1)  # type: ignore[arg-type]
        self.jobs: list[tuple[bool, list[int], Future[None]]] = []
        self.maps: list[int] = []
        self.reach = 0

    def move(self, *, store, alone, raw, offsets, pages):  # type: ignore[no-untyped-def]
        job: Future[None] = Future()
        self.jobs.append((store, list(offsets), job))
        return job

    def map(self, descriptor: int) -> None:
        self.maps.append(descriptor)

    @property
    def reached_bytes(self) -> int:
        return self.reach


def ranks_mover(path: Path) -> tuple[RanksMover, Told, memoryview, int]:
    model = load(path, Part(0, 2), Fidelity.EXACT)
    lead = Told()
    mover = RanksMover(model.new_pool(BLOCKS), model, lead)
    block = model.spec.layout.block_bytes
    return mover, lead, memoryview(bytearray(BLOCKS * block)), block


async def test_a_copy_has_happened_when_all_have_copied(path: Path) -> None:
    mover, lead, arena, block = ranks_mover(path)
    assert mover.forms.stored.block_bytes == block, "others count in whole blocks"
    assert not mover.sees_all and await mover.finite([1, 2])
    behind: list[int] = []
    copying = asyncio.create_task(mover.load(arena, [block], [2], queued=lambda: behind.append(1)))
    await until(lambda: len(lead.jobs) == 1)
    await asyncio.sleep(0.05)
    assert not copying.done() and not behind, "the other rank has not answered"
    lead.jobs[0][2].set_result(None)
    await copying
    assert behind == [1]
    storing = asyncio.create_task(mover.store([2], arena, [0]))
    await until(lambda: len(lead.jobs) == 2)
    storing.cancel()
    await asyncio.sleep(0.05)
    assert not storing.done(), "its places would be given away under the other rank"
    lead.jobs[1][2].set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await storing
    assert [(store, offsets) for store, offsets, _ in lead.jobs] == [(False, [block]), (True, [0])]
    mover.close()


async def test_a_rank_that_cannot_copy_fails_the_copy_and_opens_the_gate(path: Path) -> None:
    mover, lead, arena, _ = ranks_mover(path)
    opened: list[int] = []
    for fails in (False, True):
        gate = Gate(2, changed=lambda: opened.append(1))
        copying = asyncio.create_task(mover.load_groups(arena, [0], [1], gate))
        await until(lambda count=1 + fails: len(lead.jobs) == count)  # type: ignore[misc]
        await asyncio.sleep(0.05)
        assert gate.come_groups == 0, "no layer is there before every rank has it"
        if fails:
            lead.jobs[-1][2].set_exception(Unreachable("no arena"))
            with pytest.raises(Unreachable):
                await copying
            assert gate.come_groups == 0
        else:
            lead.jobs[-1][2].set_result(None)
            await copying
            assert gate.come_groups == len(gate.groups)
        gate.pass_layer(0)  # a step is held up by neither
    mover.close()


async def test_blocks_are_reachable_when_every_rank_has_mapped_them(path: Path) -> None:
    mover, lead, arena, block = ranks_mover(path)
    offsets = [at * block for at in range(BLOCKS)]
    descriptors = iter((7, 8))
    mover.meet(arena, lambda: next(descriptors))
    assert mover.reachable(arena, offsets) == 0
    lead.reach = 3 * block
    assert mover.reachable(arena, offsets) == 3
    assert mover.reachable_bytes == 3 * block
    lead.reach = arena.nbytes
    assert mover.reachable(arena, offsets) == BLOCKS
    another = memoryview(bytearray(arena.nbytes))
    mover.reachable(another, offsets)
    assert lead.maps == [7, 8], "a new arena is given to the ranks, the same one is not again"
    mover.close()
    mover.forget()
