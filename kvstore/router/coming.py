"""Prefixes that are being computed now: one tree over the prompts in flight. Pure.

Names are a chain, so an equal name at an index means equal prefixes up to it, and prompts that
share a beginning share a path. An edge is a run of names of one prompt (a reference to its list,
never a copy); every node counts the prompts that pass through it, by worker.

       [system prompt, 40 blocks]   a: 2, b: 1
        ├── [turn 1, 12 blocks]     a: 1
        └── [turn 1', 7 blocks]     a: 1, b: 1

One descent answers for all workers at once, in O(log blocks) probes per node on the path, however
many prompts are in flight. Adding and removing a prompt costs the same.
"""

from collections.abc import Sequence

from kvstore.core.names import BlockName
from kvstore.directory.places import longest_prefix


class Node:
    """Blocks `[start, end)` of one chain, and how many prompts at each worker contain them."""

    __slots__ = ("children", "counts", "end", "names", "parent", "start")

    def __init__(
        self, names: Sequence[BlockName], start: int, end: int, parent: "Node | None"
    ) -> None:
        self.names = names
        self.start = start
        self.end = end
        self.parent = parent
        self.children: dict[BlockName, Node] = {}
        self.counts: dict[str, int] = {}

    def common(self, names: Sequence[BlockName]) -> int:
        """Return the index up to which `names` agrees with this node; its first name does."""
        start, mine = self.start, self.names
        length = min(self.end, len(names)) - start
        if mine[start + length - 1] == names[start + length - 1]:
            return start + length
        return start + longest_prefix(lambda at: mine[start + at] == names[start + at], length)


class Coming:
    """The tree. A prompt is known by the node at which it ends."""

    def __init__(self) -> None:
        self._top = Node((), 0, 0, None)

    def __bool__(self) -> bool:
        """Say whether any prompt is in it."""
        return bool(self._top.children)

    def add(self, worker: str, names: Sequence[BlockName]) -> Node:
        """Note a prompt on its way at `worker`; the answer is what `remove` wants."""
        node = self._top
        while node.end < len(names):
            child = node.children.get(names[node.end])
            if child is None:
                child = Node(names, node.end, len(names), node)
                node.children[names[node.end]] = child
            else:
                end = child.common(names)
                if end < child.end:
                    child = self._split(child, end)
            node = child
            node.counts[worker] = node.counts.get(worker, 0) + 1
        return node

    def remove(self, worker: str, last: Node) -> None:
        """Forget one prompt that `add` put at `last`."""
        node = last
        while node.parent is not None:
            parent = node.parent
            if node.counts[worker] > 1:
                node.counts[worker] -= 1
            else:
                del node.counts[worker]
                if not node.counts:
                    del parent.children[node.names[node.start]]
            node = parent

    def blocks(self, names: Sequence[BlockName]) -> dict[str, int]:
        """Return, by worker, how many leading blocks of `names` some prompt there contains."""
        found: dict[str, int] = {}
        node = self._top
        while node.end < len(names):
            child = node.children.get(names[node.end])
            if child is None:
                break
            node = child
            end = node.common(names)
            for worker in node.counts:
                found[worker] = end
            if end < node.end:
                break
        return found

    @staticmethod
    def _split(node: Node, at: int) -> Node:
        """Cut a node in two; the lower half stays the object that prompts know as their end."""
        assert node.parent is not None and node.start < at < node.end
        upper = Node(node.names, node.start, at, node.parent)
        upper.counts = dict(node.counts)
        node.parent.children[node.names[node.start]] = upper
        upper.children[node.names[at]] = node
        node.start, node.parent = at, upper
        return upper
