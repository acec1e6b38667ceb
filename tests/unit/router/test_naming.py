import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.errors import BadInput
from kvstore.core.names import Root, chain, pack_tokens
from kvstore.router import naming
from kvstore.router.naming import CHUNK_TOKENS, NameCache

ROOT = Root(bytes(32))


def tokens(*runs: tuple[int, int]) -> bytes:
    return b"".join(pack_tokens([value]) * count for value, count in runs)


def test_a_conversation_is_named_once() -> None:
    cache = NameCache()
    first = tokens((1, 3 * CHUNK_TOKENS + 40))
    assert cache.names(ROOT, first) == list(chain(ROOT, first))
    assert (cache.known_tokens, cache.named_tokens) == (0, 3 * CHUNK_TOKENS + 32)
    second = first + tokens((2, CHUNK_TOKENS))
    assert cache.names(ROOT, second) == list(chain(ROOT, second))
    assert cache.known_tokens == 3 * CHUNK_TOKENS
    other = Root(bytes([1]) * 32)
    assert cache.names(other, second) == list(chain(other, second))
    assert cache.known_tokens == 3 * CHUNK_TOKENS


def test_equal_hashes_of_different_chunks_never_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "xxh3_64_intdigest", lambda piece: 7)
    cache = NameCache()
    for value in (1, 2, 1):
        prompt = tokens((value, 2 * CHUNK_TOKENS))
        assert cache.names(ROOT, prompt) == list(chain(ROOT, prompt))


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), max_size=12), st.integers(1, 4)
)
def test_names_are_those_of_the_chain_whatever_was_forgotten(
    prompts: list[list[int]], room: int
) -> None:
    cache = NameCache(max_chunks=room)
    for values in prompts:
        prompt = tokens(*((value, CHUNK_TOKENS) for value in values), (9, 17))
        assert cache.names(ROOT, prompt) == list(chain(ROOT, prompt))
        assert len(cache) <= room


def test_bytes_that_are_no_tokens_are_refused() -> None:
    with pytest.raises(BadInput, match="have 5 bytes"):
        NameCache().names(ROOT, b"12345")
    assert NameCache().names(ROOT, b"") == []
