"""The naming scheme against its published vectors, and its refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvstore.core.errors import BadInput, TooLarge
from kvstore.core.limits import BLOCK_TOKENS, MAX_EXTRA_KEY_BYTES
from kvstore.core.names import (
    BlockName,
    ExtraKey,
    Fidelity,
    Namespace,
    PackedNames,
    Root,
    chain,
    derive_root,
    join_names,
    pack_tokens,
    split_names,
)

_PAGE = Path(__file__).resolve().parents[3] / "docs" / "names.md"
_ROOT = Root(bytes(range(32)))


def _vectors() -> dict[str, Any]:
    block = re.search(r"^```json\n(.*?)^```", _PAGE.read_text(encoding="utf-8"), re.S | re.M)
    assert block is not None, "docs/names.md has no vectors"
    vectors: dict[str, Any] = json.loads(block.group(1))
    return vectors


VECTORS = _vectors()


def _namespace(**changes: Any) -> Namespace:
    fields: dict[str, Any] = {
        "weights_digest": "ab", "kv_dtype": "float32", "layers": 2, "kv_heads": 1, "head_dim": 8,
    }  # fmt: skip
    return Namespace(**(fields | changes))


@pytest.mark.parametrize("vector", VECTORS["roots"])
def test_roots_equal_the_published_ones(vector: dict[str, Any]) -> None:
    namespace = Namespace(**vector["namespace"])
    assert namespace.digest().hex() == vector["namespace_digest"]
    key = bytes.fromhex(VECTORS["cluster_key"])
    root = derive_root(key, namespace.digest(), vector["share_domain"])
    assert root.hex() == vector["root"]


@pytest.mark.parametrize("vector", VECTORS["chains"])
def test_chains_equal_the_published_ones(vector: dict[str, Any]) -> None:
    extras = [ExtraKey(offset, bytes.fromhex(value)) for offset, value in vector["extra_keys"]]
    root = Root(bytes.fromhex(vector["root"]))
    names = chain(root, pack_tokens(vector["tokens"]), extra_keys=extras)
    assert [name.hex() for name in names] == vector["names"]


def test_vectors_cover_what_can_differ() -> None:
    assert {len(v["names"]) for v in VECTORS["chains"]} >= {0, 1, 2, 3}
    assert any(v["extra_keys"] for v in VECTORS["chains"])
    assert len({v["root"] for v in VECTORS["roots"]}) == len(VECTORS["roots"]) >= 3


@pytest.mark.parametrize(
    "change",
    [
        {"weights_digest": "ac"},
        {"kv_dtype": "bfloat16"},
        {"layers": 3},
        {"kv_heads": 2},
        {"head_dim": 16},
        {"kind": "opaque"},
        {"adapter_digest": "x"},
        {"fidelity": Fidelity.FP8},
        {"layout_version": 2},
        {"block_tokens": 32},
        {"rope": "x"},
        {"attention": "x"},
        {"rotation": "hadamard"},
        {"kv_scales": "x"},
        {"group": "mla"},
    ],
)
def test_every_field_of_a_namespace_changes_its_digest(change: dict[str, Any]) -> None:
    assert _namespace(**change).digest() != _namespace().digest()
    assert len(Namespace.__dataclass_fields__) == 15, "name the new field here and in docs/names.md"


def test_neighbouring_fields_cannot_trade_characters() -> None:
    assert _namespace(rope="ab", attention="c").digest() != (
        _namespace(rope="a", attention="bc").digest()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_tokens": 15}, "block_tokens"),
        ({"block_tokens": 0}, "block_tokens"),
        ({"block_tokens": -16}, "block_tokens"),
        ({"layers": 0}, "layers"),
        ({"kv_heads": -1}, "kv_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"layout_version": 0}, "layout_version"),
        ({"weights_digest": ""}, "weights_digest"),
    ],
)
def test_a_bad_namespace_names_its_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        _namespace(**change)


def test_a_root_needs_a_real_key_and_a_whole_digest() -> None:
    with pytest.raises(BadInput, match="cluster key"):
        derive_root(b"short", bytes(32), "default")
    with pytest.raises(BadInput, match="31 bytes"):
        derive_root(bytes(32), bytes(31), "default")


def test_share_domains_and_clusters_do_not_share_names() -> None:
    digest = _namespace().digest()
    roots = {derive_root(key, digest, who) for key in (b"k" * 16, b"l" * 16) for who in ("a", "b")}
    assert len(roots) == 4


@pytest.mark.parametrize("bad", [-1, 1 << 32, 1.5, "7", None])
def test_tokens_are_unsigned_32_bit(bad: Any) -> None:
    with pytest.raises(BadInput, match="token id"):
        pack_tokens([1, bad, 3])


def test_tokens_may_come_from_any_iterable() -> None:
    assert pack_tokens(iter([1, 2**32 - 1])) == b"\x01\0\0\0\xff\xff\xff\xff"


def test_packed_tokens_must_be_whole() -> None:
    with pytest.raises(BadInput, match="63 bytes"):
        list(chain(_ROOT, bytes(63)))


@pytest.mark.parametrize(
    ("extra", "error"),
    [
        (ExtraKey(-1, b""), BadInput),
        (ExtraKey(16, b""), BadInput),
        (ExtraKey(0, bytes(MAX_EXTRA_KEY_BYTES + 1)), TooLarge),
    ],
)
def test_bad_extra_keys(extra: ExtraKey, error: type[BadInput]) -> None:
    with pytest.raises(error):
        list(chain(_ROOT, pack_tokens(range(16)), extra_keys=[extra]))


def test_the_largest_extra_key_is_accepted() -> None:
    extra = ExtraKey(15, bytes(MAX_EXTRA_KEY_BYTES))
    assert len(list(chain(_ROOT, pack_tokens(range(16)), extra_keys=[extra]))) == 1


def test_an_extra_key_in_the_partial_block_changes_no_name() -> None:
    tokens = pack_tokens(range(20))
    assert list(chain(_ROOT, tokens, extra_keys=[ExtraKey(17, b"x")])) == list(chain(_ROOT, tokens))


def test_larger_engine_blocks() -> None:
    assert len(list(chain(_ROOT, pack_tokens(range(70)), block_tokens=32))) == 2


def test_names_travel_packed() -> None:
    names = [BlockName(bytes([i]) * 32) for i in range(3)]
    assert split_names(join_names(names)) == names
    assert split_names(b"") == []
    with pytest.raises(BadInput, match="33 bytes"):
        split_names(bytes(33))


def test_packed_names_are_the_names_they_hold() -> None:
    names = list(chain(Root(bytes(32)), pack_tokens(range(5 * BLOCK_TOKENS))))
    packed = PackedNames(join_names(names))
    assert len(packed) == 5 and list(packed) == names and packed == names
    assert (packed[0], packed[-1]) == (names[0], names[4])
    assert packed[1:3] == names[1:3] and packed[3:1] == [] and packed[::2] == names[::2]
    assert packed == PackedNames(join_names(names)) and packed != names[:4] and packed != 5
    assert len({packed, PackedNames(join_names(names))}) == 1
    for outside in (5, -6):
        with pytest.raises(IndexError):
            packed[outside]
    with pytest.raises(BadInput, match="33 bytes"):
        PackedNames(bytes(33))
