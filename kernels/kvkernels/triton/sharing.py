"""Which sequences of a step hold the same pages at the start of their tables, and for how long.

Groups nest: all sequences may share a system prompt, some of them a conversation beyond it. A
group's pages are attended once for all its queries, level after level, and the rest of each
sequence apart (`triton.launch`). A group is made only where it saves more reading than another
launch costs, so a batch that shares nothing, or little, is served as if this module were not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy
from numpy.typing import NDArray

MOST_LEVELS: Final = 3
"""Each level is a launch more."""

Tables = NDArray[numpy.int32]


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences whose tables hold the same pages in columns [begin, end)."""

    level: int
    rows: tuple[int, ...]
    begin: int
    end: int


def find_groups(
    tables: Tables, usable: Sequence[int], *, tile_pages: int, least: float
) -> list[Group]:
    """Return the groups worth a pass of their own, shallow ones first.

    tables [sequences, max_pages]; usable: leading pages of each that may be shared, 0 for none;
    a group ends at a multiple of `tile_pages`, and (members - 1) * pages reaches `least`. Groups of
    one level are disjoint, and a deeper one's members are all in one shallower group.
    """
    rows = numpy.flatnonzero(numpy.asarray(usable) > 0)
    limits = numpy.asarray(usable)
    found = _split(tables, limits, rows, 0, 0, 0, tile_pages, least)
    return sorted(found, key=lambda group: group.level)


def _split(
    tables: Tables,
    limits: NDArray[numpy.int64],
    rows: NDArray[numpy.int64],
    covered: int,
    equal: int,
    level: int,
    tile_pages: int,
    least: float,
) -> Iterator[Group]:
    """Yield groups among `rows`, whose first `equal` pages are the same, `covered` of them done."""
    rows = rows[limits[rows] > equal]
    if level == MOST_LEVELS or len(rows) < 2:
        return
    pages = tables[rows, equal]
    for page in numpy.unique(pages):
        members = rows[pages == page]
        most = int(limits[members].max())
        if len(members) < 2 or (len(members) - 1) * (most - covered) < least:
            continue
        common = _common(tables, members, equal, int(limits[members].min()))
        end = common // tile_pages * tile_pages
        if end > covered and (len(members) - 1) * (end - covered) >= least:
            yield Group(level, tuple(members.tolist()), covered, end)
            yield from _split(tables, limits, members, end, common, level + 1, tile_pages, least)
        else:
            yield from _split(tables, limits, members, covered, common, level, tile_pages, least)


def _common(tables: Tables, rows: NDArray[numpy.int64], start: int, stop: int) -> int:
    """Return up to which column before `stop` all rows are equal, from `start` on."""
    part = tables[rows, start:stop]
    different = numpy.flatnonzero((part != part[:1]).any(axis=0))
    return start + int(different[0]) if len(different) else stop
