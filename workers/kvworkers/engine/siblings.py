"""Replies to one prompt that share its pages: who computes it, who waits, who forks. Pure.

    first ──computes the prompt──▶ first token ──▶ …
    others ──wait──────────────────────┴─fork─▶ …     full pages by another hold,
                                                      the last one copied

What the prompt's last position gave is kept while one of them lives, so that a fork computes
nothing. A page is never written again where its prompt stands: whoever has the prompt in
its pages can be forked from, whatever it has generated since.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.core.limits import BLOCK_TOKENS
from kvworkers.engine.sampling import Sampled

if TYPE_CHECKING:
    from kvworkers.engine.sequence import Request, Sequence

Copies = Seq[tuple[int, int]]
"""Pages to copy, and into which."""

_Key = tuple[str, bytes, bytes, bytes, tuple[bool, bool, bool]]


@dataclass(eq=False, slots=True)
class Family:
    """Sequences of one prompt under one root that are not finished."""

    members: "list[Sequence]" = field(default_factory=list)
    first: Sampled | None = None
    """What the first of them chose behind the prompt; where others may choose otherwise, with the
    logits."""

    def source(self) -> "Sequence | None":
        """Return one whose pages hold the prompt; None before its first token is known too."""
        if self.first is None:
            return None
        return next((one for one in self.members if one.pages and _has_prompt(one)), None)

    def computes(self) -> bool:
        """Say whether one is about to have the prompt: whoever waits for it computes nothing."""
        return self.first is None and any(
            one.pages and one.finish is None and one.state in ("loading", "running")
            for one in self.members
        )


class Families:
    """Every family of one worker."""

    def __init__(self) -> None:
        self._families: dict[_Key, Family] = {}

    def join(self, sequence: "Sequence") -> None:
        """Let a sequence be one of its family, if its request names one."""
        if sequence.request.siblings:
            key = _key(sequence.root, sequence.request)
            sequence.family = self._families.setdefault(key, Family())
            sequence.family.members.append(sequence)

    def leave(self, sequence: "Sequence") -> None:
        """Forget a sequence that is finished."""
        family, sequence.family = sequence.family, None
        if family is not None:
            family.members.remove(sequence)
            if not family.members:
                del self._families[_key(sequence.root, sequence.request)]


def awaits_first(sequence: "Sequence") -> bool:
    """Say whether others will choose from what this one's prompt gives first."""
    return sequence.family is not None and sequence.family.first is None


def full_pages(source: "Sequence") -> list[int]:
    """Return the pages that the prompt fills: forks share them."""
    return source.pages[: source.prompt_blocks]


def last_page(source: "Sequence") -> list[int]:
    """Return the page that the prompt's end has a part of, which each fork copies; may be none."""
    partial = source.prompt_tokens % BLOCK_TOKENS > 0
    return source.pages[source.prompt_blocks : source.prompt_blocks + 1] if partial else []


def _has_prompt(sequence: "Sequence") -> bool:
    return sequence.computed >= sequence.prompt_tokens


def _key(root: bytes, request: "Request") -> _Key:
    # Where only ids are wanted no logits are kept, so those that need them are a family of their
    # own; what a salt separates must not meet here, nor what is kept and what is not.
    return (
        request.siblings, root, request.cache_salt, request.tokens,
        (request.sampling.only_id, request.no_store, request.no_read),
    )  # fmt: skip
