"""A reply as its wire wants it: with its first chunk at hand, or whole."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Generic, TypeVar

Piece = TypeVar("Piece")


class Started(Generic[Piece]):
    """A reply whose first chunk is there: a failure before it can still become a status code."""

    def __init__(self, first: Piece, rest: AsyncGenerator[Piece, None]) -> None:
        self.first = first
        self._rest = rest

    async def chunks(self) -> AsyncGenerator[Piece, None]:
        """Yield every chunk, the first included."""
        yield self.first
        async for chunk in self._rest:
            yield chunk

    async def close(self) -> None:
        """End the request, whether its chunks were ever asked for or not."""
        await self._rest.aclose()


async def begin(chunks: AsyncGenerator[Piece, None]) -> Started[Piece]:
    """Wait for the first chunk of a reply."""
    return Started(await anext(chunks), chunks)


async def whole(chunks: AsyncGenerator[Piece, None]) -> list[Piece]:
    """Return every chunk of a reply that is wanted in one piece."""
    async with aclosing(chunks):
        return [chunk async for chunk in chunks]
