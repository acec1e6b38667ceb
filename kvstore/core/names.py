"""Names of blocks: a SHA-256 chain from a root that only the cluster can derive.

A name covers its block and every block before it, so equal names mean equal prefixes. The
root covers everything else that must match before two engines may exchange bytes, and the
set of tenants that may share, keyed with the cluster's secret: a tenant can neither name nor
probe another's blocks (DESIGN D5).

    root   = HMAC-SHA256(cluster_key, "kvstore.root.v1" | frame(namespace digest) | frame(domain))
    name_0 = SHA-256(root   | tokens of block 0 as u32 little endian | extra keys of block 0)
    name_i = SHA-256(name_i-1 | tokens of block i | extra keys of block i)

An extra key (an image's digest, a cache salt) belongs to the block that holds its token
offset and is framed as `u32 offset in block | u32 length | bytes`; parent and tokens have fixed
sizes, so no two inputs give the same byte string. `docs/names.md` publishes test vectors.
"""

import hashlib
import hmac
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, NamedTuple, NewType, overload

import numpy as np

from kvstore.core.errors import BadInput, TooLarge
from kvstore.core.limits import BLOCK_TOKENS, MAX_EXTRA_KEY_BYTES, NAME_BYTES

BlockName = NewType("BlockName", bytes)
"""32 bytes: the SHA-256 of a block in its chain."""

Root = NewType("Root", bytes)
"""32 bytes: where a chain starts; handed out by the node when a session opens."""


class NamespaceKind(StrEnum):
    """Whose names and bytes a namespace holds."""

    CANONICAL = "canonical"
    """Our names over token ids and the one layout; any engine of ours may exchange them."""
    OPAQUE = "opaque"
    """An engine's own keys and bytes, never decoded here."""


class Fidelity(StrEnum):
    """No copy under a root is ever lossier than its fidelity (DESIGN D3)."""

    EXACT = "exact"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


def check_fidelity(field: str, value: str) -> None:
    """Raise `BadInput` naming `field` where `value` is no fidelity."""
    if value not in list(Fidelity):
        raise BadInput(f"{field} {value!r}: one of {', '.join(Fidelity)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """Everything that must match before two engines may exchange KV bytes."""

    weights_digest: str
    """SHA-256 over the weights' files, not the model's name."""
    kv_dtype: str
    """Element type of raw K and V: `float32`, `bfloat16`, `float16`."""
    layers: int
    kv_heads: int
    head_dim: int
    kind: NamespaceKind = NamespaceKind.CANONICAL
    adapter_digest: str = ""
    """Content of a LoRA adapter: a reloaded adapter keeps its name and changes its bytes."""
    fidelity: Fidelity = Fidelity.EXACT
    layout_version: int = 1
    block_tokens: int = BLOCK_TOKENS
    rope: str = ""
    """RoPE factors as frozen at load, rendered canonically."""
    attention: str = ""
    """Attention parameters that change K or V: window, sinks, norms of q and k."""
    rotation: str = ""
    """`hadamard` when all pages under the root hold rotated K and V."""
    kv_scales: str = ""
    """Digest of an engine's own KV scales, where it has such."""
    group: str = "full"
    """Layer group: `full`, `mla`, `window:4096`, `state` …"""

    def __post_init__(self) -> None:
        if self.block_tokens % BLOCK_TOKENS or self.block_tokens <= 0:
            raise BadInput(f"block_tokens must be a multiple of {BLOCK_TOKENS}")
        for name in ("layers", "kv_heads", "head_dim", "layout_version"):
            if getattr(self, name) <= 0:
                raise BadInput(f"namespace {name} must be positive, got {getattr(self, name)}")
        if not self.weights_digest:
            raise BadInput("namespace weights_digest is empty: weights have to be identified")

    def digest(self) -> bytes:
        """Return 32 bytes over every field; field names are framed too, so order is no secret."""
        state = hashlib.sha256(b"kvstore.namespace.v1")
        for field in fields(self):
            for text in (field.name, str(getattr(self, field.name))):
                encoded = text.encode()
                state.update(len(encoded).to_bytes(4, "little") + encoded)
        return state.digest()


class ExtraKey(NamedTuple):
    """Something besides token ids that changes the KV of the block at `token_offset`."""

    token_offset: int
    value: bytes


def derive_root(cluster_key: bytes, namespace_digest: bytes, share_domain: str) -> Root:
    """Return the root of (namespace, share domain) in the cluster that owns `cluster_key`."""
    if len(cluster_key) < 16:
        raise BadInput("cluster key is shorter than 16 bytes")
    if len(namespace_digest) != NAME_BYTES:
        raise BadInput(f"namespace digest has {len(namespace_digest)} bytes, not {NAME_BYTES}")
    message = bytearray(b"kvstore.root.v1")
    for part in (namespace_digest, share_domain.encode()):
        message += len(part).to_bytes(4, "little") + part
    return Root(hmac.new(cluster_key, message, hashlib.sha256).digest())


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Return token ids as packed u32 little endian, the form that `chain` and the wire use.

    Raises `BadInput` naming the first id outside [0, 2**32).
    """

    listed = list(tokens)
    try:
        packed = array("I", listed)
    except (OverflowError, TypeError):
        bad = next(i for i in listed if not isinstance(i, int) or not 0 <= i < 1 << 32)
        raise BadInput(f"token id {bad!r} is not an unsigned 32-bit integer") from None
    assert packed.itemsize == 4
    return packed.tobytes()


def chain(
    root: Root | BlockName,
    tokens: bytes | bytearray | memoryview,
    *,
    extra_keys: Sequence[ExtraKey] = (),
    block_tokens: int = BLOCK_TOKENS,
) -> list[BlockName]:
    """Return one name per full block of packed u32 tokens.

    A partial last block has no name: it can still change. `root` may also be the name of a
    block, to go on from a known prefix. Cost: about 0.4 µs a block (one SHA-256 of 96 bytes).
    Raises `BadInput` where the bytes are no whole tokens or an extra key lies outside them.
    """
    # Slices of bytes cost half of slices of a view, which counts in this loop.
    data = tokens if type(tokens) is bytes else bytes(memoryview(tokens).cast("B"))
    if len(data) % 4:
        raise BadInput(f"packed tokens have {len(data)} bytes, not a multiple of 4")
    step = block_tokens * 4
    if extra_keys:
        return list(_chain_with_extras(root, memoryview(data), sorted(extra_keys), step))
    parent: Any = root  # a BlockName without a call to say so: that, too, counts here
    sha256, whole = hashlib.sha256, data[: len(data) - len(data) % step]
    # Cut in one call: slices cost a seventh of this loop. And one call on 96 joined bytes is
    # cheaper than two on the parts.
    parts = np.frombuffer(whole, f"V{step}").tolist()
    names: Any = [parent := sha256(parent + part).digest() for part in parts]
    return names  # type: ignore[no-any-return]


def _chain_with_extras(
    parent: bytes, view: memoryview, extras: list[ExtraKey], step: int
) -> Iterator[BlockName]:
    """Do what `chain` does for requests that carry extra keys (sorted by offset)."""
    for extra in extras:
        if not 0 <= extra.token_offset < max(1, len(view) // 4):
            raise BadInput(f"extra key at token {extra.token_offset} lies outside the prompt")
        if len(extra.value) > MAX_EXTRA_KEY_BYTES:
            raise TooLarge(f"extra key of {len(extra.value)} bytes; {MAX_EXTRA_KEY_BYTES} allowed")
    cursor = 0
    for start in range(0, len(view) - step + 1, step):
        state = hashlib.sha256(parent)
        state.update(view[start : start + step])
        while cursor < len(extras) and extras[cursor].token_offset * 4 < start + step:
            offset, value = extras[cursor]
            state.update((offset - start // 4).to_bytes(4, "little"))
            state.update(len(value).to_bytes(4, "little"))
            state.update(value)
            cursor += 1
        parent = state.digest()
        yield BlockName(parent)


def join_names(names: Iterable[BlockName]) -> bytes:
    """Return names as the one packed `bytes` field that RPCs carry."""
    return b"".join(names)


class PackedNames(Sequence[BlockName]):
    """Names as they came in one packed field; cut out one by one only where somebody asks.

    Raises `BadInput` when `packed` is not whole names.
    """

    __slots__ = ("packed",)

    def __init__(self, packed: bytes) -> None:
        if len(packed) % NAME_BYTES:
            raise BadInput(f"names have {len(packed)} bytes, not a multiple of {NAME_BYTES}")
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed) // NAME_BYTES

    @overload
    def __getitem__(self, at: int) -> BlockName: ...
    @overload
    def __getitem__(self, at: slice) -> "PackedNames": ...
    def __getitem__(self, at: int | slice) -> "BlockName | PackedNames":
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step != 1:
                return PackedNames(b"".join(self[i] for i in range(start, stop, step)))
            return PackedNames(self.packed[start * NAME_BYTES : max(start, stop) * NAME_BYTES])
        index = at + len(self) if at < 0 else at
        if not 0 <= index < len(self):
            raise IndexError(at)
        return BlockName(self.packed[index * NAME_BYTES : (index + 1) * NAME_BYTES])

    def __iter__(self) -> Iterator[BlockName]:
        return iter(split_names(self.packed))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedNames):
            return self.packed == other.packed
        return isinstance(other, list | tuple) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(self.packed)


def split_names(packed: bytes) -> list[BlockName]:
    """Return the names in a packed field; raises `BadInput` when it is not whole names."""
    if len(packed) % NAME_BYTES:
        raise BadInput(f"names have {len(packed)} bytes, not a multiple of {NAME_BYTES}")
    return [BlockName(packed[at : at + NAME_BYTES]) for at in range(0, len(packed), NAME_BYTES)]
