"""The drawn error tree is the real one."""

import copy
import pickle
import re

import pytest

from kvstore.core import errors
from kvstore.core.errors import KvStoreError, Refused


def _descendants(cls: type[KvStoreError]) -> list[type[KvStoreError]]:
    """Return the classes of this package below `cls`; others' test classes do not count."""
    below: list[type[KvStoreError]] = []
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            below += [child, *_descendants(child)]
    return below


TREE = _descendants(KvStoreError)


def test_the_drawing_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    parents = {0: "KvStoreError"}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ((?:│   |    )*)[├└]── (\w+)", line):
            depth = len(found.group(1)) // 4
            drawn[found.group(2)] = parents[depth]
            parents[depth + 1] = found.group(2)
    assert drawn == {cls.__name__: cls.__bases__[0].__name__ for cls in TREE}
    assert len(drawn) >= 11


@pytest.mark.parametrize("cls", TREE)
def test_every_error_says_what_it_means_and_survives_pickling(cls: type[KvStoreError]) -> None:
    assert cls.__doc__
    error = cls("slot 7 is gone")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is cls
        assert str(twin) == "slot 7 is gone"


def test_refusals_carry_when_to_retry() -> None:
    assert Refused("full").retry_after_ms == 0
    twin = pickle.loads(pickle.dumps(Refused("full", 250)))
    assert (str(twin), twin.retry_after_ms) == ("full", 250)
