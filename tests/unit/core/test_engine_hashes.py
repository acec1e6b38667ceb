"""Block hashes of engines, against digests that vLLM 0.33's own functions gave."""

import pytest

from kvstore.core.engine_hashes import (
    EngineHashes,
    HashAlgorithm,
    cache_salt,
    encode_cbor,
    event_hash,
    lora,
)
from kvstore.core.errors import BadInput

VECTORS = {
    "sha256": (
        "066b1e8987e027138e98701c46128929378935f9b6cd1549105ae6b4f0d71198",
        "fe8fa5dda3210d0ca2031e37cbe3b001186773cd1c710beb2d45fcb51d434798",
        "8be7aaa33831156d316f1f463ae57e643deb63f42e633e2d631df88815cc4629",
        "700a67997281b8a6054e672a0644fdefdd355998255c1ce71796914c58b54a1e",
    ),
    "sha256_cbor": (
        "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0",
        "dc918a88b139e5afe60b88eda27508d4aee16c10fdc354791efea06206ac0749",
        "c300ec275d7bf08af8fc63e76cdc0086911bbc7091e03c5cf892553bef84ef0c",
        "9792dd13eaf4fce5856f795db782b31ae39c63dd8103d5249475583a8a3ea2c2",
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_published_digests_are_reproduced(name: str) -> None:
    hashes = EngineHashes.of(name)
    seed, first, second, extra = VECTORS[name]
    assert hashes.first_parent.hex() == seed
    assert [digest.hex() for digest in hashes.chain(range(40), 16)] == [first, second]
    keys = (lora("a", "/p"), cache_salt("s"))
    assert hashes.block(None, range(16), keys).hex() == extra
    chained = hashes.chain(range(16), 16, extra={0: keys})
    assert [digest.hex() for digest in chained] == [extra]


@pytest.mark.parametrize("algorithm", list(HashAlgorithm))
def test_a_chain_goes_on_from_a_known_block(algorithm: HashAlgorithm) -> None:
    hashes = EngineHashes(algorithm)
    whole = list(hashes.chain(range(64), 16))
    assert list(hashes.chain(range(32, 64), 16, parent=whole[1])) == whole[2:]
    other = EngineHashes(algorithm, seed="1")
    assert set(other.chain(range(64), 16)).isdisjoint(whole)


def test_the_same_string_twice_hashes_as_two_strings_do() -> None:
    # A pickler writes the second sight of an object as a reference.
    name = "adapter"
    same = EngineHashes(HashAlgorithm.SHA256).block(None, range(16), (lora(name, name),))
    other = "".join(["adap", "ter"])
    assert same == EngineHashes(HashAlgorithm.SHA256).block(None, range(16), (lora(name, other),))


def test_an_event_hash_is_the_end_of_the_digest() -> None:
    digest = bytes.fromhex(VECTORS["sha256_cbor"][1])
    assert event_hash(digest) == int("91efea06206ac0749"[-16:], 16)
    with pytest.raises(BadInput, match="7 bytes"):
        event_hash(bytes(7))


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        # RFC 8949, appendix A.
        (0, "00"), (23, "17"), (24, "1818"), (100, "1864"), (1000, "1903e8"),
        (1_000_000, "1a000f4240"), (1_000_000_000_000, "1b000000e8d4a51000"),
        (18_446_744_073_709_551_615, "1bffffffffffffffff"), (-1, "20"), (-1000, "3903e7"),
        (False, "f4"), (True, "f5"), (None, "f6"), (b"\x01\x02\x03\x04", "4401020304"),
        ("", "60"), ("IETF", "6449455446"), ("\u6c34", "63e6b0b4"), ((), "80"),
        ((1, (2, 3), (4, 5)), "8301820203820405"),
    ],
)  # fmt: skip
def test_cbor_is_canonical(value: object, encoded: str) -> None:
    assert encode_cbor(value).hex() == encoded


def test_what_has_no_encoding_is_named() -> None:
    with pytest.raises(BadInput, match="float"):
        encode_cbor((1.5,))
    with pytest.raises(BadInput, match="64 bits"):
        encode_cbor(1 << 64)
    with pytest.raises(BadInput, match="xxhash"):
        EngineHashes.of("xxhash")
    with pytest.raises(BadInput, match="block_tokens"):
        list(EngineHashes().chain(range(16), 0))
