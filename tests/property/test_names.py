"""What must hold for every prompt: prefixes, injectivity, agreement with a naive hash."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.names import ExtraKey, Root, chain, pack_tokens

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=80)
ROOTS = st.binary(min_size=32, max_size=32).map(Root)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[ExtraKey]]:
    tokens = draw(st.lists(st.integers(0, 3), min_size=1, max_size=70))
    offsets = st.integers(0, len(tokens) - 1)
    extras = draw(
        st.lists(st.tuples(offsets, st.binary(max_size=6)).map(lambda t: ExtraKey(*t)), max_size=4)
    )
    return tokens, extras


def naive(root: bytes, tokens: list[int], extras: list[ExtraKey]) -> list[bytes]:
    names: list[bytes] = []
    parent = root
    for block in range(len(tokens) // 16):
        text = parent + b"".join(t.to_bytes(4, "little") for t in tokens[16 * block :][:16])
        for offset, value in sorted(extras):
            if offset // 16 == block:
                text += (offset % 16).to_bytes(4, "little")
                text += len(value).to_bytes(4, "little") + value
        parent = hashlib.sha256(text).digest()
        names.append(parent)
    return names


@given(ROOTS, prompts())
def test_chain_is_the_naive_hash(root: Root, prompt: tuple[list[int], list[ExtraKey]]) -> None:
    tokens, extras = prompt
    assert list(chain(root, pack_tokens(tokens), extra_keys=extras)) == naive(root, tokens, extras)


@given(ROOTS, TOKENS, TOKENS)
def test_names_of_a_prefix_are_a_prefix_of_the_names(
    root: Root, head: list[int], tail: list[int]
) -> None:
    whole = list(chain(root, pack_tokens(head + tail)))
    assert whole[: len(head) // 16] == list(chain(root, pack_tokens(head)))


@given(ROOTS, TOKENS, st.integers(0, 5))
def test_a_chain_goes_on_from_any_name(root: Root, tokens: list[int], at: int) -> None:
    whole = list(chain(root, pack_tokens(tokens)))
    if at < len(whole):
        assert list(chain(whole[at], pack_tokens(tokens[16 * (at + 1) :]))) == whole[at + 1 :]


@given(prompts(), prompts())
def test_different_prompts_have_different_names(
    one: tuple[list[int], list[ExtraKey]], other: tuple[list[int], list[ExtraKey]]
) -> None:
    """Block i is named equally exactly when everything up to its end is equal."""
    root = Root(bytes(32))
    first, second = (
        list(chain(root, pack_tokens(tokens), extra_keys=extras)) for tokens, extras in (one, other)
    )
    for block in range(min(len(first), len(second))):
        end = 16 * (block + 1)
        seen = [
            (tokens[:end], sorted(e for e in extras if e.token_offset < end))
            for tokens, extras in (one, other)
        ]
        assert (first[block] == second[block]) == (seen[0] == seen[1])


@given(ROOTS, prompts())
def test_the_order_of_extra_keys_does_not_matter(
    root: Root, prompt: tuple[list[int], list[ExtraKey]]
) -> None:
    tokens, extras = prompt
    shuffled = list(reversed(extras))
    packed = memoryview(bytearray(pack_tokens(tokens)))
    assert list(chain(root, packed, extra_keys=shuffled)) == list(
        chain(root, pack_tokens(tokens), extra_keys=extras)
    )
