"""What an engine's answer says about its cache, read while it passes by. Pure."""

import re
from typing import Final

TAIL_BYTES: Final = 16 << 10
"""The end of an answer that is kept: `usage` is its last part, streamed or not."""

# Text that a model wrote has its quotes escaped, so only a real key matches.
_CACHED: Final = re.compile(rb'"cached_tokens"\s*:\s*(\d{1,9})')


class AnswerTail:
    """The end of one answer's body."""

    def __init__(self) -> None:
        self._tail = b""
        self.size = 0
        """Bytes that came so far."""

    def add(self, piece: bytes) -> None:
        """Take the next piece of the body."""
        self.size += len(piece)
        self._tail = (self._tail + piece)[-TAIL_BYTES:]

    def cached_tokens(self) -> int | None:
        """Return `usage.prompt_tokens_details.cached_tokens`; None where it is not said."""
        found = _CACHED.findall(self._tail)
        return int(found[-1]) if found else None
