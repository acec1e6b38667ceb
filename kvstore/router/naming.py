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
                chunk = self._remember(key, piece, names[-1] if names else root)
            else:
                chunks.move_to_end(key)
                self.known_tokens += CHUNK_TOKENS
            names += chunk.names
            before = chunk.number
            start += _CHUNK_BYTES
        if start < len(tokens):
            names += chain(names[-1] if names else root, tokens[start:])
            self.named_tokens += (len(tokens) - start) // _STEP_BYTES * BLOCK_TOKENS
        return names

    def _remember(
        self, key: tuple[bytes | int, int], piece: bytes, parent: Root | BlockName
    ) -> _Chunk:
        chunk = _Chunk(self._next, piece, list(chain(parent, piece)))
        self._next += 1
        self.named_tokens += CHUNK_TOKENS
        self._chunks[key] = chunk
        self._chunks.move_to_end(key)
        if len(self._chunks) > self._max_chunks:
            self._chunks.popitem(last=False)
        return chunk
