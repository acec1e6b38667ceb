"""Names of prompts whose beginning was named before: a conversation is hashed once, not each turn.

Prompts are cut in chunks of `CHUNK_TOKENS`. A chunk is found by its predecessor and a fast hash of
its bytes, and then its bytes are compared, so a collision costs a naming and never a wrong name.
Only what follows the last known chunk goes through SHA-256.

    root ── chunk 0 (system prompt) ──┬── chunk 1 (turn 1) ── chunk 2
                                      └── chunk 1' (another conversation)
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_64_intdigest

from kvstore.core.errors import BadInput
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import BlockName, Root, chain

CHUNK_TOKENS: Final = 1_024
"""Tokens found or named together: 64 blocks. The rest of a prompt is named anew each time."""

MAX_CHUNKS: Final = 4_096
"""Chunks remembered: 4 M tokens, about 37 MB; the longest unused are forgotten first."""

_CHUNK_BYTES: Final = CHUNK_TOKENS * 4
_STEP_BYTES: Final = BLOCK_TOKENS * 4


@dataclass(slots=True)
class _Chunk:
    number: int
    """Never given twice, so that what followed a forgotten chunk is never found again."""
    tokens: bytes
    names: list[BlockName]


class NameCache:
    """Names prompts and remembers those of whole chunks. Of one event loop or thread."""

    def __init__(self, *, max_chunks: int = MAX_CHUNKS) -> None:
        assert max_chunks > 0
        self._max_chunks = max_chunks
        self._chunks: OrderedDict[tuple[bytes | int, int], _Chunk] = OrderedDict()
        self._next = 1
        self.known_tokens = 0
        """Tokens whose names were found, since the start."""
        self.named_tokens = 0
        """Tokens whose names were computed."""

    def __len__(self) -> int:
        """Return the number of chunks remembered."""
        return len(self._chunks)

    def names(self, root: Root, tokens: bytes) -> list[BlockName]:
        """Return the names of the full blocks of packed u32 tokens, as `chain` does.

        Raises `BadInput` where the bytes are no whole tokens.
        """
        if len(tokens) % 4:
            raise BadInput(f"packed tokens have {len(tokens)} bytes, not a multiple of 4")
        chunks, names = self._chunks, list[BlockName]()
        before: bytes | int = root
        start, whole = 0, len(tokens) - len(tokens) % _CHUNK_BYTES
        while start < whole:
            piece = tokens[start : start + _CHUNK_BYTES]
            key = (before, xxh3_64_intdigest(piece))
            chunk = chunks.get(key)
            if chunk is None or chunk.tokens != piece:
                break  # nothing that follows can be known
            chunks.move_to_end(key)
            names += chunk.names
            before = chunk.number
            start += _CHUNK_BYTES
        self.known_tokens += start // 4
        if start < len(tokens):
            fresh = chain(names[-1] if names else root, tokens[start:])
            self.named_tokens += len(fresh) * BLOCK_TOKENS
            self._remember(before, tokens[start:whole], fresh)
            names += fresh
        return names

    def _remember(self, before: bytes | int, tokens: bytes, names: list[BlockName]) -> None:
        """Keep the whole chunks of what was named; the longest unused make room."""
        chunks, number = self._chunks, self._next
        blocks = _CHUNK_BYTES // _STEP_BYTES
        for at in range(len(tokens) // _CHUNK_BYTES):
            piece = tokens[at * _CHUNK_BYTES : (at + 1) * _CHUNK_BYTES]
            key = (before, xxh3_64_intdigest(piece))
            chunks[key] = _Chunk(number, piece, names[at * blocks : (at + 1) * blocks])
            chunks.move_to_end(key)
            before = number
            number += 1
        self._next = number
        while len(chunks) > self._max_chunks:
            chunks.popitem(last=False)
