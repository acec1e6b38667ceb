"""Block hashes as engines make them, reproduced from token ids. Not our names (`core.names`).

vLLM calls a full block by H((parent, token ids, extra keys)), where parent is the digest of the
block before it or H(seed), and H is SHA-256 over one of two encodings:

    sha256        pickle, protocol 5: what CPython's pickler writes, and only that
    sha256_cbor   canonical CBOR (RFC 8949 §4.2.1): the one to use across languages

A router or a store that computes them can tell whether an engine's published hash is the hash
of the tokens that came with it, and find by tokens what an adapter stored under engine hashes.
Weights are in neither: two checkpoints of one model give equal hashes.
"""

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from kvstore.core.errors import BadInput, TooLarge
from kvstore.core.limits import MAX_EXTRA_KEY_BYTES

DEFAULT_SEED: Final = "vllm-none-hash"
"""What engines hash in place of a first block's parent where PYTHONHASHSEED is not set."""

EVENT_HASH_BYTES: Final = 8
"""An int hash in an event is the digest's last 8 bytes, big endian."""

_MAX_UINT: Final = (1 << 64) - 1

ExtraValue = str | bytes | int | None
EngineExtra = tuple[ExtraValue, ...]
"""One tagged extra key, as `lora` and `cache_salt` below build them."""


class HashAlgorithm(StrEnum):
    """Value of the engine's `--prefix-caching-hash-algo`; its xxhash kinds are no names."""

    SHA256 = "sha256"
    SHA256_CBOR = "sha256_cbor"


def lora(name: str, path: str) -> EngineExtra:
    """Return the extra key of every block computed with an adapter."""
    return ("lora", name, path)


def cache_salt(salt: str) -> EngineExtra:
    """Return the extra key that the first block of a salted request has."""
    return ("cache_salt", salt)


@dataclass(frozen=True, slots=True)
class EngineHashes:
    """The hashes of engines that run with one algorithm and one seed."""

    algorithm: HashAlgorithm = HashAlgorithm.SHA256_CBOR
    seed: str = DEFAULT_SEED
    """The engines' PYTHONHASHSEED where it is set: equal in all that are to agree."""
    first_parent: bytes = field(init=False)
    """32 bytes in place of a first block's parent."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "first_parent", self._digest(self.seed))

    @classmethod
    def of(cls, algorithm: str, seed: str = DEFAULT_SEED) -> "EngineHashes":
        """Return the hashes of an engine's flag value; raises `BadInput` naming an unknown one."""
        try:
            return cls(HashAlgorithm(algorithm), seed)
        except ValueError:
            known = ", ".join(HashAlgorithm)
            raise BadInput(f"hash algorithm {algorithm!r} is not one of {known}") from None

    def block(
        self, parent: bytes | None, tokens: Sequence[int], extra: Sequence[EngineExtra] = ()
    ) -> bytes:
        """Return the 32-byte digest of one full block; `parent` is None for the first one.

        `extra` stands in the engine's order: adapter, images, salt, embeddings. Raises
        `BadInput` for a token or an extra key that has no encoding.
        """
        keys = tuple(extra) or None
        return self._digest((parent or self.first_parent, tuple(tokens), keys))

    def chain(
        self,
        tokens: Sequence[int],
        block_tokens: int,
        *,
        parent: bytes | None = None,
        extra: Mapping[int, Sequence[EngineExtra]] | None = None,
    ) -> Iterator[bytes]:
        """Yield one digest per full block; `extra[i]` holds the extra keys of block `i`."""
        if block_tokens <= 0:
            raise BadInput(f"block_tokens must be positive, got {block_tokens}")
        for at in range(len(tokens) // block_tokens):
            part = tokens[at * block_tokens : (at + 1) * block_tokens]
            parent = self.block(parent, part, (extra or {}).get(at, ()))
            yield parent

    def _digest(self, value: object) -> bytes:
        # pickle only writes here: nothing that came from outside is ever loaded.
        if self.algorithm is HashAlgorithm.SHA256_CBOR:
            return hashlib.sha256(encode_cbor(value)).digest()
        return hashlib.sha256(pickle.dumps(_own_strings(value), protocol=5)).digest()


def event_hash(digest: bytes) -> int:
    """Return the int that an engine publishes for a digest: a hint of 64 bits, never a name."""
    if len(digest) < EVENT_HASH_BYTES:
        raise BadInput(f"a digest of {len(digest)} bytes; {EVENT_HASH_BYTES} or more are needed")
    return int.from_bytes(digest[-EVENT_HASH_BYTES:], "big")


def encode_cbor(value: object) -> bytes:
    """Return canonical CBOR of None, bool, int, bytes, str, and tuples or lists of such."""
    match value:
        case None:
            return b"\xf6"
        case bool():
            return b"\xf5" if value else b"\xf4"
        case int():
            return _cbor_head(0, value) if value >= 0 else _cbor_head(1, -1 - value)
        case bytes():
            return _cbor_head(2, len(value)) + value
        case str():
            encoded = value.encode()
            return _cbor_head(3, len(encoded)) + encoded
        case tuple() | list():
            return _cbor_head(4, len(value)) + b"".join(map(encode_cbor, value))
        case _:
            raise BadInput(f"no encoding for a {type(value).__name__} in a block hash")


def _cbor_head(major: int, argument: int) -> bytes:
    """Return a data item's head: the shortest form, as canonical CBOR asks."""
    if argument > _MAX_UINT:
        raise BadInput(f"{argument} has more than 64 bits")
    if argument < 24:
        return bytes((major << 5 | argument,))
    size = next(size for size in (1, 2, 4, 8) if argument < 1 << 8 * size)
    return bytes((major << 5 | 23 + size.bit_length(),)) + argument.to_bytes(size, "big")


def _own_strings(value: object) -> object:
    """Return a copy in which no two strings are the same object.

    A pickler writes the second sight of an object as a reference, so equal inputs could pickle
    differently. The engine's strings come from separate fields; so do ours after this.
    """
    match value:
        case str():
            if len(value.encode()) > MAX_EXTRA_KEY_BYTES:
                raise TooLarge(f"a string of {len(value)} in a hash; {MAX_EXTRA_KEY_BYTES} bytes")
            return value.encode().decode()
        case tuple():
            return tuple(map(_own_strings, value))
        case _:
            return value
