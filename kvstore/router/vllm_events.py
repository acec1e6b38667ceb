"""What vLLM's KV events say, in our words. No socket in here.

vLLM names a block by a hash that cannot always be computed again from the event (adapters, images
and salts go into it, paths do not come out), and that is an int of 64 bits by default. So hashes
are only looked up here, never trusted as names: our name of a block is computed from the token ids
that `BlockStored` carries, behind its parent's. A block whose name would not cover everything
that went into its hash is left out: the view then promises less, never something else.

Where the engines' algorithm is known, every hash is computed again and compared (`EngineHashes`):
then two blocks whose 64 bits collide are told apart, and a salt, which events carry untagged, is
known to be one and goes into the name.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from kvstore.core.engine_hashes import EngineHashes, cache_salt, event_hash
from kvstore.core.errors import BadInput
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import BlockName, ExtraKey, Root, chain, pack_tokens
from kvstore.directory.events import Changed, Digest, TierKind
from kvstore.directory.publisher import xor_prefixes

FULL_KINDS: Final = (None, "full_attention", "mla_attention", "sink_full_attention")
"""Groups of layers that keep every block of a prefix; the others' blocks are no prefix."""

MAX_HASHES: Final = 1 << 22
"""Hashes known of one engine: 4 M blocks of 16 tokens; later ones are left out."""


class Block(NamedTuple):
    """One block of an engine, which is one or more of ours."""

    root: Root
    names: tuple[BlockName, ...]
    digest: bytes | None
    """The engine's whole hash where it was computed and agreed."""


class _Event(NamedTuple):
    """The parts of a `BlockStored` that names are made from."""

    keys: list[int]
    tokens: list[int]
    size: int
    """Tokens in a block of the engine."""
    parent: Block | None
    adapter: object
    extra: list[Any]
    """Extra keys of each block, untagged."""


class VllmIndex:
    """Blocks in one engine's GPU, by the low 64 bits of vLLM's hash."""

    def __init__(self, root: Root, hashes: EngineHashes | None = None) -> None:
        self._root = root
        self._hashes = hashes
        self._blocks: dict[int, Block] = {}
        self._copies: dict[int, int] = {}
        self.skipped = 0
        """Blocks left out since the start: unknown parent, no tokens, extra keys, other layers."""
        self.disagreed = 0
        """Those of them whose hash is not that of their tokens."""
        self._count = 0
        self._xor = 0

    def digest(self) -> Digest:
        """Return count and xor of what is held."""
        return Digest(TierKind.HBM, self._count, self._xor)

    def held(self) -> list[Changed]:
        """Return everything that is held, as parts of a snapshot."""
        by_root: dict[Root, list[BlockName]] = {}
        for block in self._blocks.values():
            by_root.setdefault(block.root, []).extend(block.names)
        return [Changed(root, TierKind.HBM, names) for root, names in by_root.items()]

    def apply(self, payload: bytes) -> list[Changed]:
        """Return what a batch changes, without numbers; raises `BadInput` for no batch."""
        changes: list[Changed] = []
        for event in _events(payload):
            match event.get("type"):
                case "BlockStored":
                    changes += self._store(event)
                case "BlockRemoved":
                    changes += self._remove(event)
                case "AllBlocksCleared":
                    changes += self._clear()
        return changes

    def _store(self, event: dict[str, Any]) -> list[Changed]:
        hashes = [hash_key(raw) for raw in _list(event, "block_hashes")]
        named = self._named(event, hashes) if _is_ours(event) else []
        self.skipped += len(hashes) - len(named)
        root, added = self._root, list[BlockName]()
        for key, block in zip(hashes, named, strict=False):
            root = block.root
            # A block can lie there twice, or be announced again: it is gone with the last copy.
            self._copies[key] = self._copies.get(key, 0) + 1
            if key not in self._blocks:
                self._blocks[key] = block
                added += block.names
        return self._changed(root, added, deleted=False)

    def _named(self, event: dict[str, Any], hashes: list[int]) -> list[Block]:
        """Return the blocks of an event that can be named: the first ones."""
        tokens, size = _list(event, "token_ids"), event.get("block_size")
        if not isinstance(size, int) or size <= 0 or size % BLOCK_TOKENS:
            return []
        root, parent, adapter = self._root, None, event.get("lora_name")
        if adapter is not None:
            root = Root(hashlib.sha256(root + str(adapter).encode()).digest())
        if (raw := event.get("parent_block_hash")) is not None:
            parent = self._blocks.get(hash_key(raw))
            if parent is None or parent.root != root:
                return []
        extra = _list(event, "extra_keys") or [None] * len(hashes)
        packed = pack_tokens(tokens)  # raises for what is no token, before anything is hashed
        parts = _Event(hashes, tokens, size, parent, adapter, extra)
        digests, salts = self._agreed(parts)
        before: Root | BlockName = parent.names[-1] if parent is not None else root
        names = chain(before, packed[: len(digests) * size * 4], extra_keys=salts)
        per = size // BLOCK_TOKENS
        return [
            Block(root, tuple(names[at * per : (at + 1) * per]), digest)
            for at, digest in enumerate(digests)
        ]

    def _agreed(self, event: _Event) -> tuple[list[bytes | None], list[ExtraKey]]:
        """Return a digest for each block that can be named (None: not computed), and its salt."""
        most = min(len(event.keys), len(event.tokens) // event.size, len(event.extra))
        most = min(most, max(0, MAX_HASHES - len(self._blocks)))
        # An adapter's path goes into the hash and is not told, so there is nothing to compare.
        hashes = self._hashes if event.adapter is None else None
        digests, salts = list[bytes | None](), list[ExtraKey]()
        parent = event.parent.digest if event.parent is not None else None
        for at in range(most):
            keys, salt = event.extra[at], None
            if keys and keys != [event.adapter]:
                salt = _salt(keys) if event.parent is None and at == 0 else None
                if hashes is None or salt is None:
                    break
            if hashes is None:
                digests.append(None)
                continue
            part = event.tokens[at * event.size : (at + 1) * event.size]
            parent = hashes.block(parent, part, () if salt is None else (cache_salt(salt),))
            if event_hash(parent) != event.keys[at]:
                self.disagreed += 1
                break
            digests.append(parent)
            salts += [ExtraKey(0, salt.encode())] if salt is not None else []
        return digests, salts

    def _remove(self, event: dict[str, Any]) -> list[Changed]:
        if not _is_ours(event):
            return []
        gone: dict[Root, list[BlockName]] = {}
        for raw in _list(event, "block_hashes"):
            key = hash_key(raw)
            left = self._copies.get(key, 0) - 1
            if left > 0:
                self._copies[key] = left
            elif left == 0:
                del self._copies[key]
                block = self._blocks.pop(key)
                gone.setdefault(block.root, []).extend(block.names)
        return [one for root, names in gone.items() for one in self._changed(root, names, True)]

    def _clear(self) -> list[Changed]:
        held = self.held()
        self._blocks.clear()
        self._copies.clear()
        return [one for part in held for one in self._changed(part.root, part.names, True)]

    def _changed(self, root: Root, names: Sequence[BlockName], deleted: bool) -> list[Changed]:
        if not names:
            return []
        self._count += -len(names) if deleted else len(names)
        self._xor ^= xor_prefixes(root, names)
        return [Changed(root, TierKind.HBM, names, deleted)]


def hash_key(raw: object) -> int:
    """Return the 64 bits that an int hash is, and that end a hash of bytes."""
    if isinstance(raw, bytes) and len(raw) >= 8:
        return int.from_bytes(raw[-8:], "big")
    if isinstance(raw, int):
        return raw & (1 << 64) - 1
    raise BadInput(f"a block hash is neither an int nor 8 bytes or more: {raw!r:.40}")


def _salt(keys: object) -> str | None:
    """Return what may be a salt: the only key of a block, and text."""
    if isinstance(keys, list) and len(keys) == 1 and isinstance(keys[0], str):
        return keys[0]
    return None


def _is_ours(event: dict[str, Any]) -> bool:
    """Say whether an event is about whole prefixes in GPU memory."""
    return (
        event.get("medium") in (None, "GPU")
        and event.get("group_idx") in (None, 0)
        and event.get("kv_cache_spec_kind") in FULL_KINDS
    )


def _list(event: dict[str, Any], field: str) -> list[Any]:
    value = event.get(field)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadInput(f"{field} of an event is no list")
    return value


def _events(payload: bytes) -> Iterable[dict[str, Any]]:
    """Return the events of a batch `[ts, events, data_parallel_rank]`."""
    try:
        batch = msgspec.msgpack.decode(payload)
    except (msgspec.MsgspecError, ValueError) as error:  # the second: text that is no UTF-8
        raise BadInput(f"a batch is no msgpack: {error}") from None
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        raise BadInput("a batch is not [time, events, rank]")
    if not all(isinstance(event, dict) for event in batch[1]):
        raise BadInput("an event is no map")
    return batch[1]
