"""Quotas: rules as written, books that agree with what is held, and tiers that keep them."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.errors import BadInput
from kvstore.core.names import Root
from kvstore.core.outcomes import Outcome
from kvstore.directory.policy import BlockKey, block_key
from kvstore.testing.contracts import OTHER_ROOT, ROOT, block
from kvstore.tiers.base import StoredTier, Terms
from kvstore.tiers.quotas import QuotaRule, Quotas
from tests import nvme_fixture
from tests.nvme_fixture import SLOT_BYTES, read, write
from tests.unit.tiers import test_files as files

HIT, MISS, REFUSED = Outcome.HIT, Outcome.MISS, Outcome.REFUSED


def rule(text: str) -> QuotaRule:
    return QuotaRule.parse(text)


def test_a_rule_reads_back_as_it_was_written() -> None:
    assert rule("domain:a:b:dram=1,files=7") == QuotaRule("domain", "a:b", {"dram": 1, "files": 7})
    for text in ("domain:acme:dram=8,nvme=9", "domain:*:dram=1", f"root:{'ab' * 32}:files=5"):
        assert str(rule(text)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("acme:dram=1", "is not domain:NAME"),
        ("domain::dram=1", "is not domain:NAME"),
        ("root:abc:dram=1", "64 hexadecimal"),
        ("domain:a:hbm=1", "'hbm' is not one of dram"),
        ("domain:a:dram=1,dram=2", "once"),
        ("domain:a:dram=much", "much"),
        ("domain:a:dram=0", "hold nothing"),
    ],
)
def test_a_wrong_rule_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        rule(text)


def test_two_rules_about_the_same_are_refused() -> None:
    with pytest.raises(BadInput, match="two for domain:a in nvme"):
        Quotas([rule("domain:a:nvme=1,dram=1"), rule("domain:a:nvme=2")])


ROOTS = [Root(bytes([n]) * 32) for n in range(4)]
DOMAINS = ["", "a", "a", "b"]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.booleans()), max_size=40))
def test_a_book_is_the_sum_of_what_came_and_went(steps: list[tuple[int, int, bool]]) -> None:
    quotas = Quotas([rule("domain:a:dram=20"), rule(f"root:{ROOTS[3].hex()}:dram=10")])
    book = quotas.book("dram")
    held: Counter[Root] = Counter()
    known: set[Root] = set()
    for number, size, opens in steps:
        root = ROOTS[number]
        if opens:
            quotas.opened(root, DOMAINS[number])
            known.add(root)
        if held[root] >= 2 * size:
            size = -size
        held[root] += size
        book.add(root, size)
    assert book.by_root == +held
    domains = Counter[str]()
    for root, size in held.items():
        domains[DOMAINS[ROOTS.index(root)] if root in known else ""] += size
    assert book.by_domain == +domains
    claim = book.claim(ROOTS[1], 5)
    over = domains["a"] + 5 - 20 if ROOTS[1] in known else 0
    assert (claim.excess_bytes if claim else 0) == max(0, over)
    if claim is not None:
        assert claim.may_go(ROOTS[1])
        assert claim.may_go(ROOTS[2]) == (ROOTS[2] in known)
        assert not claim.may_go(ROOTS[0])
        assert not claim.may_go(ROOTS[3])
    claim = book.claim(ROOTS[3], 11)
    assert claim is not None
    assert not claim.possible


async def start(kind: str, directory: Path, **more: Any) -> StoredTier:
    if kind == "nvme":
        return await nvme_fixture.start(directory, slots=16, **more)
    return await files.start(directory, blocks=16, **more)


KINDS = pytest.mark.parametrize("kind", ["nvme", "files"])


@KINDS
async def test_who_is_at_its_quota_drops_its_own(kind: str, tmp_path: Path) -> None:
    quotas = Quotas([rule(f"domain:a:{kind}={4 * SLOT_BYTES}")])
    quotas.opened(ROOT, "a")
    quotas.opened(OTHER_ROOT, "b")
    tier = await start(kind, tmp_path, terms=Terms(book=quotas.book(kind)))
    others = [block(n, root=OTHER_ROOT) for n in range(6)]
    assert await write(tier, others) == [HIT] * 6
    for number in range(7):
        assert await write(tier, [block(number)]) == [HIT]
    assert await read(tier, range(7)) == [MISS] * 3 + [HIT] * 4
    assert all(tier.holds(item.header.root, item.header.name) for item in others)
    assert quotas.book(kind).by_domain == {"a": 4 * SLOT_BYTES, "b": 6 * SLOT_BYTES}
    await tier.remove([(ROOT, block(5).header.name)])
    assert quotas.book(kind).by_root[ROOT] == 3 * SLOT_BYTES
    await tier.clear(None)
    assert not quotas.book(kind).by_root
    await tier.close()


@KINDS
async def test_a_restart_charges_what_it_finds(kind: str, tmp_path: Path) -> None:
    tier = await start(kind, tmp_path)
    await write(tier, [block(n) for n in range(5)])
    await tier.close()
    quotas = Quotas([rule(f"domain:a:{kind}={2 * SLOT_BYTES}")])
    tier = await start(kind, tmp_path, terms=Terms(book=quotas.book(kind)))
    if kind == "nvme":
        await tier.introduced()  # type: ignore[attr-defined]
    assert quotas.book(kind).by_domain == {"": 5 * SLOT_BYTES}
    quotas.opened(ROOT, "a")
    assert await write(tier, [block(9)]) == [HIT]
    assert quotas.book(kind).by_domain == {"a": 2 * SLOT_BYTES}
    await tier.close()


@KINDS
async def test_a_quota_smaller_than_a_block_costs_nobody_a_block(kind: str, tmp_path: Path) -> None:
    quotas = Quotas([rule(f"root:*:{kind}={SLOT_BYTES - 1}")])
    book = quotas.book(kind)
    tier = await start(kind, tmp_path, terms=Terms(book=book))
    assert await write(tier, [block(0), block(1)]) == [REFUSED] * 2
    assert (book.refusals, book.by_root) == (2, {})
    await tier.close()


@KINDS
async def test_a_pinned_block_stays_whatever_comes(kind: str, tmp_path: Path) -> None:
    pinned: set[BlockKey] = {block_key(ROOT, block(n).header.name) for n in range(3)}
    tier = await start(kind, tmp_path, terms=Terms(pinned=pinned.__contains__))
    for number in range(40):
        assert await write(tier, [block(number)]) == [HIT]
    assert await read(tier, range(4)) == [HIT, HIT, HIT, MISS]
    pinned.clear()
    for number in range(40, 60):
        assert await write(tier, [block(number)]) == [HIT]
    assert await read(tier, range(3)) == [MISS] * 3
    await tier.close()
