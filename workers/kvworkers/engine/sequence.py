"""One request on its way through the engine: its tokens, names, pages and account.

                   ┌──────────────── LEAVING ◀──makes way──┐
                   ▼                                       │
    WAITING ──admitted──▶ LOADING ──▶ RUNNING ─────────────┴──▶ FINISHED
       │                     │           │                         ▲
       └─────────────────────┴───────────┴─────────────────────────┘    cancelled, failed, deadline

Positions: `tokens` is the prompt and what was generated; K and V of the first `computed` tokens
stand in `pages`. The last generated token is known and not yet computed.
"""

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from kvstore.client import SlotRef
from kvstore.core.errors import BadInput, TooLarge
from kvstore.core.limits import BLOCK_TOKENS, MAX_EXTRA_KEY_BYTES
from kvstore.core.names import BlockName, ExtraKey, Root, chain
from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.rpc.convert import check_id
from kvworkers.engine.handover import HandOver
from kvworkers.engine.sampling import SamplingParams
from kvworkers.engine.siblings import Copies, Family
from kvworkers.stream.gate import Gate


class SequenceState(StrEnum):
    """Where a request stands."""

    WAITING = "waiting"
    """No pages yet, or none any more."""
    LOADING = "loading"
    """Has all its pages; cached blocks are on their way into them."""
    RUNNING = "running"
    """Takes part in steps."""
    LEAVING = "leaving"
    """Makes way: its pages go when nothing writes them and what is to be kept is copied."""
    FINISHED = "finished"
    """Its pages are given back."""


class FinishReason(StrEnum):
    """Why a request ended, as the wire says it."""

    STOP = "stop"
    """A stop token or the model's end of sequence."""
    LENGTH = "length"
    """`max_tokens` were generated."""
    ABORT = "abort"
    """Cancelled, or its deadline passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a caller wants; validated here as far as it needs no model."""

    request_id: str
    tokens: bytes
    """The prompt as packed u32 little endian."""
    sampling: SamplingParams
    no_store: bool = False
    """Compute as usual, keep nothing: neither in the store nor as cached pages."""
    no_read: bool = False
    """Ignore every cache, the worker's own pages included."""
    kind: str = ""
    """What sort of request it is, where the caller tells; evidence for the node's policy."""
    cache_salt: bytes = b""
    deadline_ms: int = 0
    """Of the whole request, from its arrival; 0: none."""
    traceparent: str = ""
    """Its place in a trace (`kvstore.observe.tracing`); empty: none."""
    siblings: str = ""
    """Requests of one prompt that say the same here share its pages; empty: none."""
    hand_over: HandOver | None = None
    """Another worker goes on: blocks are stored as each chunk ends, and this hears of it."""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise BadInput("tokens are empty: a prompt has at least one token")
        if len(self.tokens) % 4:
            raise BadInput(f"packed tokens have {len(self.tokens)} bytes, not a multiple of 4")
        if len(self.cache_salt) > MAX_EXTRA_KEY_BYTES:
            raise TooLarge(
                f"cache_salt has {len(self.cache_salt)} bytes; {MAX_EXTRA_KEY_BYTES} allowed"
            )
        check_id(self.kind, "kind")
        check_id(self.siblings, "siblings")
        if self.deadline_ms < 0:
            raise BadInput(f"deadline_ms must not be negative, got {self.deadline_ms}")

    @property
    def prompt_tokens(self) -> int:
        """Tokens in the prompt."""
        return len(self.tokens) // 4


@dataclass(frozen=True, slots=True)
class CacheUse:
    """Tokens of one prompt by where they came from; `hbm + loaded + computed = prompt`."""

    prompt_tokens: int
    hbm_tokens: int
    loaded_tokens: dict[TierKind, int]
    miss_reason: MissReason

    @property
    def cached_tokens(self) -> int:
        """Tokens that were not computed."""
        return self.hbm_tokens + sum(self.loaded_tokens.values())

    @property
    def computed_tokens(self) -> int:
        """Tokens that were computed."""
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class Away:
    """Where the pages of one that made way are: private slots of the arena."""

    first_block: int
    """Block of the sequence that `slots[0]` holds; those before it are in the store."""
    tokens: int
    """Tokens whose K and V stand there and before; the last block may be a part."""
    slots: Seq[SlotRef]


@dataclass(eq=False, slots=True)
class Sequence:
    """State of one request. Only the engine's event loop touches it."""

    request: Request
    root: Root
    arrived_ms: float
    tokens: "array[int]" = field(init=False)
    names: list[BlockName] = field(init=False)
    """Names of the full blocks of `tokens`; grows as tokens are generated."""
    pages: list[int] = field(default_factory=list)
    state: SequenceState = SequenceState.WAITING
    computed: int = 0
    """Tokens whose K and V stand in pages."""
    launched: int = 0
    """Tokens whose computation was begun; not below `computed`."""
    coming: int = 0
    """1 while a step that was begun chooses a token that is not among `tokens` yet."""
    published: int = 0
    """Leading blocks that were offered to the pool under their names."""
    stored: int = 0
    """Leading blocks that the store is known to hold or is about to be given."""
    hbm_blocks: int = 0
    loaded: dict[TierKind, int] = field(default_factory=dict)
    """Blocks that came from each lower tier."""
    store_reason: MissReason = MissReason.ABSENT
    """Why the store gave no more; what it answered last."""
    held_since_ms: float | None = None
    """Since when admission waits for another sequence that computes the same prefix."""
    first_step_ms: float | None = None
    first_token_ms: float | None = None
    load_ms: float = 0.0
    finish: FinishReason | None = None
    turn: int = 0
    """Its place in the order of arrival at this worker."""
    preemptions: int = 0
    """How often it made way."""
    away: Away | None = None
    """Its copy, between making way and coming back."""
    in_step: int = 0
    """Steps that were begun and not ended: they may be writing its pages."""
    loading: bool = False
    """A copy may be writing its pages, or reading them on their way out."""
    gate: Gate | None = None
    """That load, where a step may begin behind it before its end."""
    family: Family | None = None
    """Those it shares its prompt with."""
    branch: Copies | None = None
    """While it forks: pages to copy, each held once more until that is done."""
    forked: bool = False
    """Whether its whole prompt came out of another's pages."""
    _table: "NDArray[np.int32] | None" = None

    def __post_init__(self) -> None:
        self.tokens = array("I")
        self.tokens.frombytes(self.request.tokens)
        self.names = []
        self.extend_names()

    @property
    def prompt_tokens(self) -> int:
        """Tokens in the prompt."""
        return self.request.prompt_tokens

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def hit_limit(self) -> int:
        """Blocks that may come from a cache: one prompt token at least has to be computed."""
        return (self.prompt_tokens - 1) // BLOCK_TOKENS

    @property
    def reuse_limit(self) -> int:
        """Blocks that it may find computed: one known token at least has to be computed.

        `hit_limit` for a prompt; more for one that comes back with a part of its reply.
        """
        return (len(self.tokens) - 1) // BLOCK_TOKENS

    @property
    def known_pages(self) -> int:
        """Pages for the tokens that are known."""
        return -(-len(self.tokens) // BLOCK_TOKENS)

    @property
    def prompt_blocks(self) -> int:
        """Full blocks of the prompt."""
        return self.prompt_tokens // BLOCK_TOKENS

    @property
    def pages_needed(self) -> int:
        """Pages for the prompt and every token that it may generate.

        The last generated token is never fed back, so it needs no place.
        """
        return -(-(self.prompt_tokens + self.request.sampling.max_tokens - 1) // BLOCK_TOKENS)

    @property
    def full_blocks(self) -> int:
        """Blocks whose every token is computed."""
        return self.computed // BLOCK_TOKENS

    @property
    def unnamed_blocks(self) -> int:
        """Full blocks that may be known by name and are not yet."""
        return max(0, self.full_blocks - self.published) if self.keeps else 0

    @property
    def pending_tokens(self) -> int:
        """Tokens that are known or about to be, and not begun: 1 while decoding, more in prefill.

        0 where the one that is coming is the last.
        """
        if self.coming and self.generated + 1 >= self.request.sampling.max_tokens:
            return 0
        return len(self.tokens) + self.coming - max(self.launched, self.computed)

    @property
    def lacks_page(self) -> bool:
        """Whether it has a token to compute and no place for it."""
        start = max(self.launched, self.computed)
        return start >= len(self.pages) * BLOCK_TOKENS and self.pending_tokens > 0

    def give_up_pages(self) -> list[int]:
        """Return its pages, which are its own no more: nothing is computed."""
        pages, self.pages, self._table = self.pages, [], None
        self.computed = self.launched = self.published = 0
        return pages

    def page_table(self) -> "NDArray[np.int32]":
        """Return `pages` as an array, made once for each number of them: while it has some,
        they only grow."""
        if self._table is None or len(self._table) != len(self.pages):
            self._table = np.array(self.pages, dtype=np.int32)
        return self._table

    @property
    def keeps(self) -> bool:
        """Whether its blocks may be kept under their names."""
        return not self.request.no_store

    def check_tokens(self, vocab_size: int) -> None:
        """Raise `BadInput` naming an id of the prompt or a stop token outside the vocabulary."""
        if (worst := int(np.frombuffer(self.tokens, dtype=np.uint32).max())) >= vocab_size:
            raise BadInput(f"token id {worst} is outside the vocabulary of {vocab_size}")
        if bad := [t for t in self.request.sampling.stop_token_ids if t >= vocab_size]:
            raise BadInput(f"stop token id {bad[0]} is outside the vocabulary of {vocab_size}")

    def ends_with(self, token: int, eos_token_ids: tuple[int, ...]) -> bool:
        """Say whether `token`, just chosen, ends the reply before it."""
        sampling = self.request.sampling
        return token in sampling.stop_token_ids or (
            token in eos_token_ids and not sampling.ignore_eos
        )

    def extend_names(self) -> None:
        """Name every full block of `tokens` that has no name yet."""
        done = len(self.names)
        if len(self.tokens) // BLOCK_TOKENS == done:
            return
        fresh = self.tokens[done * BLOCK_TOKENS :].tobytes()
        if done:
            self.names.extend(chain(self.names[-1], fresh))
            return
        salt = self.request.cache_salt
        extras = (ExtraKey(0, salt),) if salt else ()
        self.names.extend(chain(self.root, fresh, extra_keys=extras))

    def cache_use(self) -> CacheUse:
        """Return the account of the prompt."""
        loaded = {tier: n * BLOCK_TOKENS for tier, n in self.loaded.items() if n}
        cached = self.hbm_blocks + sum(self.loaded.values())
        return CacheUse(
            prompt_tokens=self.prompt_tokens,
            hbm_tokens=self.prompt_tokens if self.forked else self.hbm_blocks * BLOCK_TOKENS,
            loaded_tokens=loaded,
            miss_reason=self._miss_reason(cached),
        )

    def _miss_reason(self, cached: int) -> MissReason:
        if self.forked:
            return MissReason.NONE
        if self.prompt_blocks == 0:
            return MissReason.PARTIAL_BLOCK
        if cached == self.prompt_blocks:
            return MissReason.NONE
        if cached == self.hit_limit:
            return MissReason.LAST_TOKENS
        return MissReason.DISABLED if self.request.no_read else self.store_reason
