"""Hashes that engines publish, computed again from what came with them."""

from typing import Any

import pytest

from kvstore.core.engine_hashes import EngineHashes, HashAlgorithm, cache_salt, event_hash
from kvstore.core.errors import BadInput
from kvstore.core.names import BlockName, ExtraKey, Root, chain, pack_tokens
from kvstore.router.members import parse_hashes, parse_vllm
from kvstore.router.vllm_events import VllmIndex
from tests.scripted_vllm import batch

ROOT = Root(bytes(range(32)))
TOKENS = list(range(96))
HASHES = EngineHashes()


def event(tokens: list[int], salt: str = "", **more: Any) -> dict[str, Any]:
    """Return the event of an engine that hashes as `HASHES` does, blocks of 32."""
    extra = {0: (cache_salt(salt),)} if salt else {}
    digests = list(HASHES.chain(tokens, 32, extra=extra))
    return {
        "type": "BlockStored",
        "block_hashes": [event_hash(digest) for digest in digests],
        "parent_block_hash": None,
        "token_ids": tokens,
        "block_size": 32,
        "medium": "GPU",
        "extra_keys": [[salt] if salt and not at else None for at in range(len(digests))],
        **more,
    }


def held(index: VllmIndex) -> list[BlockName]:
    return [name for part in index.held() for name in part.names]


def test_hashes_that_agree_are_named_as_without_a_check() -> None:
    checked, unchecked = VllmIndex(ROOT, HASHES), VllmIndex(ROOT)
    for index in (checked, unchecked):
        index.apply(batch(event(TOKENS)))
        assert held(index) == list(chain(ROOT, pack_tokens(TOKENS)))
    assert checked.disagreed == 0


def test_a_chain_is_checked_across_events_and_whole_digests_are_as_good_as_ints() -> None:
    index = VllmIndex(ROOT, HASHES)
    digests = list(HASHES.chain(TOKENS, 32))
    index.apply(batch(event(TOKENS[:32])))
    later = event(TOKENS[32:], block_hashes=digests[1:], parent_block_hash=digests[0])
    index.apply(batch({**later, "extra_keys": None}))
    assert held(index) == list(chain(ROOT, pack_tokens(TOKENS)))


def test_a_block_whose_hash_is_not_that_of_its_tokens_is_left_out_with_what_follows() -> None:
    index = VllmIndex(ROOT, HASHES)
    lying = event(TOKENS)
    lying["token_ids"] = [*TOKENS[:40], 7, *TOKENS[41:]]
    index.apply(batch(lying))
    assert held(index) == list(chain(ROOT, pack_tokens(TOKENS[:32])))
    assert (index.disagreed, index.skipped) == (1, 2)


def test_another_seed_or_algorithm_is_seen_at_once() -> None:
    for other in (EngineHashes(seed="0"), EngineHashes(HashAlgorithm.SHA256)):
        index = VllmIndex(ROOT, other)
        index.apply(batch(event(TOKENS)))
        assert held(index) == []
        assert index.disagreed == 1


def test_a_salt_goes_into_the_name_only_where_the_hash_proves_that_it_is_one() -> None:
    salted = event(TOKENS, salt="tenant-7")
    index = VllmIndex(ROOT, HASHES)
    index.apply(batch(salted))
    named = chain(ROOT, pack_tokens(TOKENS), extra_keys=[ExtraKey(0, b"tenant-7")])
    assert held(index) == list(named)
    for index, told in (
        (VllmIndex(ROOT), salted),  # nothing to prove it with
        (VllmIndex(ROOT, HASHES), {**event(TOKENS), "extra_keys": [["tenant-7"], None, None]}),
        (VllmIndex(ROOT, HASHES), {**salted, "extra_keys": [[["image", 3]], None, None]}),
    ):
        index.apply(batch(told))
        assert held(index) == []


def test_adapters_are_not_compared() -> None:
    index = VllmIndex(ROOT, HASHES)
    adapted = event(TOKENS, lora_name="a", block_hashes=[1, 2, 3])
    index.apply(batch({**adapted, "extra_keys": [["a"]] * 3}))
    assert len(held(index)) == 6
    assert index.disagreed == 0


def test_what_the_command_line_says() -> None:
    assert parse_hashes("") is None
    assert parse_hashes("sha256_cbor") == EngineHashes()
    assert parse_hashes("sha256:0") == EngineHashes(HashAlgorithm.SHA256, "0")
    _, events = parse_vllm("v=h:1,tcp://h:2", ROOT, parse_hashes("sha256"))
    assert events.hashes == EngineHashes(HashAlgorithm.SHA256)
    for bad in ("xxhash", "sha256:", ":0"):
        with pytest.raises(BadInput):
            parse_hashes(bad)
