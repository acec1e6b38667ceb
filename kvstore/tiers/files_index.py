"""What lies in a shared directory, as far as this node has seen: one small table a directory. Pure.

Others write and remove there too, so this is a memory of listings, corrected by the next one. What
we did ourselves while a listing was under way is not in it: then it says only what is new.
"""

from collections.abc import Iterable, Sequence

from kvstore.core.names import BlockName, Root
from kvstore.directory.policy import BlockKey, block_key
from kvstore.tiers.base import Held
from kvstore.tiers.files_device import LEAVES, leaf_of
from kvstore.tiers.quotas import Book


class FilesIndex:
    """Blocks by directory and key."""

    def __init__(self, book: Book) -> None:
        """`book` is charged for every block that is known."""
        self._book = book
        self._leaves: list[dict[BlockKey, Held]] = [{} for _ in range(LEAVES)]
        self._changes = [0] * LEAVES
        self._roots: dict[Root, Root] = {}
        self._leaf_of_key: dict[BlockKey, int] = {}
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._leaf_of_key)

    def find(self, root: Root, name: BlockName) -> Held | None:
        """Return a block by its full name."""
        held = self._leaves[leaf_of(name)].get(block_key(root, name))
        return held if held is not None and (held.root, held.name) == (root, name) else None

    def at(self, key: BlockKey) -> Held | None:
        """Return a block by its key."""
        leaf = self._leaf_of_key.get(key)
        return None if leaf is None else self._leaves[leaf][key]

    def add(self, held: Held) -> bool:
        """Note a block; False when one of its key is known, which may be another's."""
        key, leaf = block_key(held.root, held.name), leaf_of(held.name)
        if key in self._leaf_of_key:
            return False
        root = self._roots.setdefault(held.root, held.root)  # one object for all its blocks
        self._leaves[leaf][key] = Held(root, held.name, held.slot_bytes)
        self._leaf_of_key[key] = leaf
        self._changes[leaf] += 1
        self.used_bytes += held.slot_bytes
        self._book.add(root, held.slot_bytes)
        return True

    def drop(self, key: BlockKey) -> Held | None:
        """Forget a block; None when it is not known."""
        leaf = self._leaf_of_key.pop(key, None)
        if leaf is None:
            return None
        held = self._leaves[leaf].pop(key)
        self._changes[leaf] += 1
        self.used_bytes -= held.slot_bytes
        self._book.add(held.root, -held.slot_bytes)
        return held

    def changes(self, leaf: int) -> int:
        """Return a number that is another one after each change of a directory by us."""
        return self._changes[leaf]

    def compare(
        self, leaf: int, listed: Sequence[Held], changes: int
    ) -> tuple[list[Held], list[Held]]:
        """Return (new, gone) of a listing that began at `changes`."""
        known = self._leaves[leaf]
        seen = {block_key(held.root, held.name) for held in listed}
        new = [held for held in listed if block_key(held.root, held.name) not in self._leaf_of_key]
        if changes != self._changes[leaf]:
            return new, []
        return new, [held for key, held in known.items() if key not in seen]

    def under(self, root: Root | None) -> list[Held]:
        """Return every block under a root; None: all."""
        return [
            held for leaf in self._leaves for held in leaf.values() if root in (None, held.root)
        ]

    def scan(self, cursor: int, limit: int) -> tuple[list[Held], int | None]:
        """Return the blocks of directories from `cursor` on, about `limit`, and the next cursor."""
        found: list[Held] = []
        while cursor < LEAVES and len(found) < limit:
            found += self._leaves[cursor].values()
            cursor += 1
        return found, cursor if cursor < LEAVES else None


def keys_of(blocks: Iterable[Held]) -> list[BlockKey]:
    """Return the keys of blocks."""
    return [block_key(held.root, held.name) for held in blocks]
