from kvstore.core.names import BlockName
from kvstore.router.coming import Coming


def names(text: str) -> list[BlockName]:
    return [BlockName(text[: at + 1].encode()) for at in range(len(text))]


def test_one_descent_answers_for_all_workers() -> None:
    coming = Coming()
    coming.add("a", names("system+one"))
    coming.add("b", names("system+two"))
    last = coming.add("c", names("sys"))
    assert coming.blocks(names("system+one more")) == {"a": 10, "b": 7, "c": 3}
    assert coming.blocks(names("system+tw")) == {"a": 7, "b": 9, "c": 3}
    coming.remove("c", last)
    assert coming.blocks(names("sys")) == {"a": 3, "b": 3}


def test_nothing_is_kept_of_prompts_that_left() -> None:
    coming = Coming()
    ends = [coming.add("a", names(text)) for text in ("abcd", "abxy", "abcd", "ab", "z")]
    assert coming.blocks(names("abcz")) == {"a": 3}
    for end in ends:
        assert coming
        coming.remove("a", end)
    assert not coming
    assert coming.blocks(names("abcd")) == {}
