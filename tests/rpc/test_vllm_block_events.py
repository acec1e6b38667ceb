"""What vLLM publishes of blocks in the node: whole engine blocks, once each way."""

from collections.abc import Iterator

import pytest

from kvstore import Client, Namespace
from kvstore.adapters.vllm.block_events import BlockEvents, BlockWord, Placed
from kvstore.adapters.vllm.tier_events import Told
from kvstore.core.names import BlockName
from kvstore.testing.node import RunningNode, start_node
from tests.patience import until_so
from tests.vllm_halves import Engine, Request


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    with start_node(arena_bytes=16 << 20) as running:
        yield running


def heard(engine: Engine, count: int) -> list[BlockWord]:
    words: list[BlockWord] = []

    def enough() -> bool:
        assert engine.events is not None
        words.extend(engine.events.take())
        return len(words) >= count

    until_so(enough)
    assert len(words) == count
    return words


def test_blocks_are_told_by_who_stored_and_who_loaded_them_and_when_they_go(
    node: RunningNode,
) -> None:
    one, two = (Engine(str(node.run_dir), seed, events=True) for seed in (1, 2))
    until_so(lambda: one.link.usable and two.link.usable)
    request = Request("a", cache_salt="s")
    one.matched(request)
    one.step([("a", 100)], [5, 2, 7, 1])
    words = heard(one, 3)
    expected = [
        Placed(request.block_hashes[at], request.block_hashes[at - 1] if at else None,
               tuple(range(at * 32, at * 32 + 32)), None if at else "s")
        for at in range(3)
    ]  # fmt: skip
    assert sorted(words) == sorted(BlockWord(False, block) for block in expected)
    assert two.load(Request("b", cache_salt="s"), [0, 3, 6, 4]) == set()
    assert {word.block.block_hash for word in heard(two, 3)} == set(request.block_hashes)
    any_model = Namespace(weights_digest="o", kv_dtype="float32", layers=1, kv_heads=1, head_dim=8)
    with Client.connect(node.run_dir, namespace=any_model, payload_bytes=1024, shares=1) as client:
        client.clear(everything=True)
    for engine in (one, two):
        gone = heard(engine, 3)
        assert all(word.removed for word in gone)
        assert {word.block.block_hash for word in gone} == set(request.block_hashes)
        engine.close()


def test_a_block_is_there_while_all_its_parts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    events = BlockEvents(lambda: None, parts=2)
    names = [BlockName(bytes([at]) * 32) for at in range(2)]
    block = Placed(b"h" * 32, None, (1, 2), None)
    first, second = (name + block.block_hash for name in names)
    told: list[Told] = []
    monkeypatch.setattr(events._watched, "take", lambda: [told.pop(0)] if told else [])
    events.placed(names, [block])

    def words(key: bytes, *, removed: bool) -> list[bool]:
        told.append(Told((key,), removed))
        return [word.removed for word in events.take()]

    assert words(first, removed=False) == []
    assert words(second, removed=False) == [False]
    assert words(first, removed=True) == [True]
    assert words(first, removed=False) == [False]
    assert words(second, removed=True) == [True]
    assert words(first, removed=True) == []
    assert words(first, removed=True) == [], "a word that was lost before is no harm"
    events.close()
