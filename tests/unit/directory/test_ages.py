"""The order of runs by age against lists, which say the same in more memory."""

from array import array
from random import Random

from kvstore.directory.ages import Ages
from kvstore.directory.prefix_tree import Run
from kvstore.directory.reuse import BINS


def _run() -> Run:
    return Run(array("Q", [1]), None, 0)


def test_rings_hold_what_lists_do() -> None:
    random, ages = Random(3), Ages()
    bins: list[list[int]] = [[] for _ in range(BINS)]
    runs: dict[int, Run] = {}
    for _ in range(3_000):
        choice, number = random.random(), random.randrange(4)
        if choice < 0.4 or not runs:
            run = _run()
            ages.append(run, number)
            runs[ages.row(run)] = run
            bins[number].append(ages.row(run))
        elif choice < 0.6:
            row = random.choice(list(runs))
            ages.append(runs[row], number)
            next(rows for rows in bins if row in rows).remove(row)
            bins[number].append(row)
        elif choice < 0.8:
            row = random.choice(list(runs))
            del runs[row]
            ages.drop(row)
            next(rows for rows in bins if row in rows).remove(row)
        elif bins[number]:
            count = random.randint(1, len(bins[number]))
            ages.grow(number, bins[number][count - 1])
            bins[number + 1] += bins[number][:count]
            del bins[number][:count]
        assert [list(ages.rows(number)) for number in range(BINS)] == bins
    assert len(ages.runs) < 3 * max(len(runs), 200), "rows are given again"


def test_a_hidden_run_keeps_its_row_and_its_place() -> None:
    ages, runs = Ages(), [_run(), _run(), _run()]
    for run in runs:
        ages.append(run, 2)
    row = ages.row(runs[1])
    ages.hide(runs[1])
    assert (ages.runs[row], ages.row(runs[1])) == (None, 0)
    assert list(ages.rows(2))[1] == row
    ages.show(row, other := _run())
    assert (ages.runs[row], ages.row(other)) == (other, row)
    ages.hide(other)
    ages.drop(row)
    assert list(ages.rows(2)) == [ages.row(runs[0]), ages.row(runs[2])]


def test_a_row_may_be_dropped_while_they_are_gone_through() -> None:
    ages = Ages()
    for _ in range(5):
        ages.append(_run(), 0)
    for row in ages.rows(0):
        ages.drop(row)
    assert list(ages.rows(0)) == []
