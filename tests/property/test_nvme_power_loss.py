"""Power failures at any point: whole or not at all, whatever reached the medium."""

import random
import tempfile
from pathlib import Path

import pytest

from kvstore.core.outcomes import Outcome
from kvstore.testing.contracts import ROOT, block
from kvstore.testing.devices import PowerLossDisk
from tests.nvme_fixture import read, start, write

SLOTS = 20
NUMBERS = range(60)


async def _live(directory: Path, seed: int, *, last_power: bool) -> set[int]:
    """Run one life of a tier that ends without power; returns what was held and synced."""
    dice = random.Random(seed)
    disk = PowerLossDisk(seed)
    tier = await start(directory, slots=SLOTS, device=disk)
    for _ in range(dice.randrange(1, 12)):
        drawn = dice.sample(NUMBERS, dice.randrange(1, 6))
        match dice.randrange(4):
            case 0:
                await read(tier, drawn)  # asserts the bytes of a hit
            case 1:
                await tier.remove([(ROOT, block(n).header.name) for n in drawn])
            case _:
                outcomes = await write(tier, [block(n) for n in drawn])
                assert set(outcomes) <= {Outcome.HIT, Outcome.REFUSED}
    held = {n for n in NUMBERS if tier.holds(ROOT, block(n).header.name)}
    if last_power:
        disk.lose_power()
    await tier.close()
    return held


@pytest.mark.parametrize("seed", range(25))
async def test_found_whole_or_not_at_all(seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for life in range(4):
            await _live(directory, seed * 10 + life, last_power=True)
        tier = await start(directory, slots=SLOTS)
        outcomes = await read(tier, NUMBERS)
        assert set(outcomes) <= {Outcome.HIT, Outcome.MISS, Outcome.CORRUPT}
        # What was not whole is gone, and everything that is listed now is whole.
        again = await read(tier, NUMBERS)
        assert set(again) <= {Outcome.HIT, Outcome.MISS}
        assert again.count(Outcome.HIT) == outcomes.count(Outcome.HIT) == len(tier)
        await tier.close()


@pytest.mark.parametrize("seed", range(5))
async def test_with_power_everything_is_found(seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        held = await _live(Path(name), seed, last_power=False)
        tier = await start(Path(name), slots=SLOTS)
        for number in held:
            assert await read(tier, [number]) == [Outcome.HIT]
        await tier.close()


async def test_power_losses_do_lose_and_tear() -> None:
    """The disk of these tests is as bad as it says: else they would show nothing."""
    lost = torn = 0
    for seed in range(12):
        with tempfile.TemporaryDirectory() as name:
            disk = PowerLossDisk(seed)
            tier = await start(Path(name), slots=SLOTS, device=disk)
            await write(tier, [block(n) for n in range(10)])
            disk.lose_power()
            await tier.close()
            tier = await start(Path(name), slots=SLOTS)
            outcomes = await read(tier, range(10))
            lost += outcomes.count(Outcome.MISS)
            torn += outcomes.count(Outcome.CORRUPT)
            await tier.close()
    assert lost and torn
