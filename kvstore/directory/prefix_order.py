"""What list-shaped policies share: after an insertion, the prefix counts as newer than its suffix.

Owners insert what a request computed after they have told of the request, so the new suffix would
be younger than the prefix it hangs on. These policies remember each held block's parent and lift
the ancestors again, nearest first, so that the root ends up the youngest.
"""

from collections.abc import Iterator, Sequence

from kvstore.directory.policy import BlockKey


class Ancestry:
    """Parents of held blocks."""

    def __init__(self) -> None:
        self._parents: dict[BlockKey, BlockKey | None] = {}

    def add(self, blocks: Sequence[BlockKey], parent: BlockKey | None) -> None:
        """Remember a run of blocks that follow `parent`."""
        for block in blocks:
            assert block not in self._parents, f"{block} is held already"
            self._parents[block] = parent
            parent = block

    def drop(self, block: BlockKey) -> bool:
        """Forget a block; False when it was not held."""
        return self._parents.pop(block, -1) != -1

    def above(self, block: BlockKey) -> Iterator[BlockKey]:
        """Yield the held ancestors of a held block, nearest first, each once.

        Names come from callers: A after B in one call and B after A in another make a ring, which
        no chain of hashes would.
        """
        seen = {block}
        parent = self._parents[block]
        while parent is not None and parent in self._parents and parent not in seen:
            seen.add(parent)
            yield parent
            parent = self._parents[parent]

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, block: object) -> bool:
        return block in self._parents
