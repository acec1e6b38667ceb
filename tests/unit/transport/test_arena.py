"""The arena: sealed shared memory, its table, and what foreign descriptors get."""

import fcntl
import mmap
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.errors import BadInput
from kvstore.core.limits import GRANULE_BYTES
from kvstore.core.names import BlockName, Root
from kvstore.core.slots import SlotState, SlotWord
from kvstore.transport import arena as arena_module
from kvstore.transport.arena import (
    HEADER_BYTES,
    RECORD_BYTES,
    ArenaMapping,
    ArenaSize,
    SlotRecord,
    create_arena,
)

SIZE = ArenaSize(data_bytes=64 * GRANULE_BYTES, max_slots=40)
RECORD = SlotRecord(
    offset=3 * GRANULE_BYTES,
    block_bytes=2 * GRANULE_BYTES,
    payload_bytes=5000,
    shares=5,
    position=17,
    root=Root(b"r" * 32),
    name=BlockName(b"n" * 32),
    sum=b"s" * 16,
    group=2,
)


@pytest.fixture
def arena() -> Iterator[int]:
    fd = create_arena(SIZE)
    yield fd
    os.close(fd)


@pytest.fixture
def owner(arena: int) -> Iterator[ArenaMapping]:
    mapping = ArenaMapping(arena, owner=True)
    yield mapping
    mapping.close()


@pytest.fixture
def client(arena: int) -> Iterator[ArenaMapping]:
    mapping = ArenaMapping(arena)
    yield mapping
    mapping.close()


def test_a_new_arena_is_empty(client: ArenaMapping) -> None:
    assert client.incarnation == 0
    assert list(client.slots()) == list(range(40))
    assert {client.word(slot) for slot in client.slots()} == {SlotWord(0, SlotState.FREE, 0)}
    assert len(client.data) == SIZE.data_bytes
    assert not any(client.data)


def test_what_the_owner_writes_every_client_sees(owner: ArenaMapping, client: ArenaMapping) -> None:
    word = SlotWord(0, SlotState.FREE, 0).to(SlotState.RESERVED, session=9)
    owner.set_record(39, RECORD)
    owner.set_word(39, word)
    owner.incarnation = 4
    assert client.word(39) == word
    assert client.record(39) == RECORD
    assert client.incarnation == 4
    assert client.word(38) == SlotWord(0, SlotState.FREE, 0)
    assert client.record(0).block_bytes == 0


def test_a_record_leaves_the_word_alone(owner: ArenaMapping) -> None:
    word = SlotWord(5, SlotState.RESERVED, 3)
    owner.set_word(1, word)
    owner.set_record(1, RECORD)
    assert owner.word(1) == word


def test_clients_write_blocks_and_never_the_table(
    owner: ArenaMapping, client: ArenaMapping
) -> None:
    client.block(GRANULE_BYTES, GRANULE_BYTES)[:5] = b"hello"
    assert bytes(owner.data[GRANULE_BYTES : GRANULE_BYTES + 5]) == b"hello"
    with pytest.raises(TypeError, match="read-only"):
        client.set_word(0, SlotWord(0, SlotState.FREE, 0))
    with pytest.raises(TypeError, match="read-write"):
        client.set_record(0, RECORD)
    with pytest.raises(TypeError, match="read-only"):
        client.incarnation = 1


def test_blocks_stay_inside(client: ArenaMapping) -> None:
    for offset, length in ((-GRANULE_BYTES, GRANULE_BYTES), (SIZE.data_bytes, GRANULE_BYTES)):
        with pytest.raises(AssertionError):
            client.block(offset, length)
    with pytest.raises(AssertionError):
        client.record(SIZE.max_slots)


def test_a_sealed_arena_neither_shrinks_nor_grows(arena: int) -> None:
    for length in (0, SIZE.total_bytes - 1, SIZE.total_bytes + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(arena, length)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert os.fstat(arena).st_size == SIZE.total_bytes


def test_descriptors_do_not_leak_into_children(arena: int) -> None:
    assert not os.get_inheritable(arena)


@pytest.mark.parametrize("content", [b"", b"kvarena1", b"x" * 8192])
def test_foreign_descriptors_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with path.open("r+b") as file, pytest.raises(BadInput, match="not a kvstore arena"):
        ArenaMapping(file.fileno())


@pytest.mark.parametrize(
    ("field", "value"),
    [(1, 41 << 20), (2, 65 * GRANULE_BYTES), (3, SIZE.data_offset + 4096), (1, 0), (2, 5)],
)
def test_headers_that_lie_are_refused(field: int, value: int) -> None:
    values = [b"kvarena1", SIZE.max_slots, SIZE.data_bytes, SIZE.data_offset, 0]
    values[field] = value
    fd = os.memfd_create("liar")
    try:
        os.ftruncate(fd, SIZE.total_bytes)
        os.pwrite(fd, struct.pack("<8sQQQQ", *values), 0)
        with pytest.raises(BadInput, match="arena"):
            ArenaMapping(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("data_bytes", "max_slots"),
    [(0, 1), (GRANULE_BYTES - 1, 1), (GRANULE_BYTES + 1, 1), (-GRANULE_BYTES, 1), (4096, 0)],
)
def test_bad_sizes(data_bytes: int, max_slots: int) -> None:
    with pytest.raises(BadInput, match="arena"):
        ArenaSize(data_bytes, max_slots)


@given(st.integers(1, 100_000), st.integers(1, 1000))
def test_table_and_data_do_not_overlap(max_slots: int, granules: int) -> None:
    size = ArenaSize(granules * GRANULE_BYTES, max_slots)
    assert size.data_offset >= HEADER_BYTES + max_slots * RECORD_BYTES
    assert size.data_offset % mmap.ALLOCATIONGRANULARITY == 0
    assert size.total_bytes == size.data_offset + size.data_bytes


def test_prefault_reports_to_the_end(owner: ArenaMapping) -> None:
    seen: list[tuple[int, int]] = []
    owner.prefault(lambda done, total: seen.append((done, total)))
    owner.prefault()
    assert seen[-1] == (SIZE.data_bytes, SIZE.data_bytes)


def test_prefault_on_an_old_kernel_is_no_failure(
    owner: ArenaMapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "_MADV_POPULATE_WRITE", 9999)
    seen: list[tuple[int, int]] = []
    owner.prefault(lambda done, total: seen.append((done, total)))
    assert seen == []


def test_a_view_outliving_its_mapping_is_a_loud_bug(arena: int) -> None:
    mapping = ArenaMapping(arena)
    view = mapping.block(0, GRANULE_BYTES)
    with pytest.raises(BufferError):
        mapping.close()
    view.release()


def test_the_page_shows_the_record_as_it_is() -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "formats.md"
    rows = re.findall(r"^\| (\d+)–(\d+) \| ", page.read_text(encoding="utf-8"), flags=re.M)
    ranges = [(int(first), int(last) + 1) for first, last in rows]
    assert [stop for _, stop in ranges[:-1]] == [start for start, _ in ranges[1:]]
    assert ranges[-1][1] == RECORD_BYTES
    sizes = [stop - start for start, stop in ranges[:-1]]
    assert sizes == [8, 4, 4, 4, 2, 2, 4, 32, 32, 16]
    assert struct.calcsize(arena_module._RECORD.format) == sum(sizes)
