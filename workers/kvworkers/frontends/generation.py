"""What a user asks for and what comes back, whichever wire it travels on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from kvstore.core.errors import BadInput, TooLarge
from kvstore.core.limits import MAX_DEADLINE_MS, MAX_EXTRA_KEY_BYTES
from kvstore.core.outcomes import MissReason
from kvstore.directory.events import TierKind
from kvstore.rpc.v1 import types_pb2, worker_pb2
from kvworkers.frontends.messages import Message, Tool

MAX_STOPS: Final = 16
MAX_STOP_CHARACTERS: Final = 256
MAX_MESSAGES: Final = 4_096
MAX_STOP_TOKENS: Final = 64
_MAX_U32: Final = (1 << 32) - 1
MAX_BIASES: Final = 1_024
MAX_LOGPROBS: Final = 20
"""As OpenAI's API has it."""
ROLES: Final = frozenset({"system", "user", "assistant", "tool"})


class FieldError(BadInput):
    """A caller's mistake in one named field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param or None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingChoice:
    """How tokens are chosen. Raises `BadInput` naming the field at fault."""

    max_tokens: int | None = None
    """None: the frontend's default, as far as the model's context allows. 0: the prompt is computed
    and kept, nothing is generated."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int = 0
    """How many top log-probabilities come with each token and its own; 0: none at all."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise BadInput(f"max_tokens must not be negative, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 2):
            raise BadInput(f"temperature must lie in 0 to 2, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p must lie above 0 and up to 1, got {self.top_p}")
        if not 0 <= self.top_k <= _MAX_U32:
            raise BadInput(f"top_k must not be negative or over 32 bits, got {self.top_k}")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise BadInput(f"{len(self.stop_token_ids)} stop tokens; {MAX_STOP_TOKENS} allowed")
        if any(not 0 <= token <= _MAX_U32 for token in self.stop_token_ids):
            raise BadInput("stop_token_ids has something that is no token id")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            raise BadInput("seed does not fit 64 bits")
        if not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise BadInput(f"top_logprobs must lie in 0 to {MAX_LOGPROBS}, got {self.logprobs}")
        self._check_shaping()

    def _check_shaping(self) -> None:
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise FieldError(f"{name} must lie in -2 to 2, got {getattr(self, name)}", name)
        if not 0 <= self.min_p <= 1:
            raise FieldError(f"min_p must lie in 0 to 1, got {self.min_p}", "min_p")
        if len(self.logit_bias) > MAX_BIASES:
            many = f"logit_bias has {len(self.logit_bias)} tokens; {MAX_BIASES} allowed"
            raise FieldError(many, "logit_bias")
        for token, bias in self.logit_bias:
            if not 0 <= token <= _MAX_U32:
                raise FieldError(f"logit_bias: {token} is no token id", "logit_bias")
            if not -100 <= bias <= 100:
                raise FieldError(f"logit_bias must lie in -100 to 100, got {bias}", "logit_bias")

    def to_proto(self, max_tokens: int, grammar: str = "") -> worker_pb2.Sampling:
        """Return the wire form with the tokens still wanted, and what they have to follow."""
        return worker_pb2.Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            # The wire's zero means "not said", and float32 rounds tiny values to it.
            top_p=max(self.top_p, 1e-6),
            top_k=self.top_k,
            seed=(self.seed or 0) & ((1 << 64) - 1),
            has_seed=self.seed is not None,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            grammar=grammar,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            min_p=self.min_p,
            logit_bias=dict(self.logit_bias),
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """What a reply's text has to follow."""

    grammar: str
    """In llguidance's Lark."""
    schemas: tuple[tuple[str, Any], ...] = ()
    """JSON schemas that it is made of, each with its place in the request."""
    place: str = "grammar"
    """Of the whole in the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One request. Exactly one of `messages`, `text` and `tokens` is given."""

    request_id: str
    model: str = ""
    """Empty: the only one."""
    messages: Sequence[Message] | None = None
    text: str | None = None
    tokens: Sequence[int] | None = None
    sampling: SamplingChoice = field(default_factory=SamplingChoice)
    stop: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = ()
    """What the prompt says may be called."""
    shape: Shape | None = None
    """What the reply has to follow; None: nothing."""
    no_store: bool = False
    kind: str = ""
    no_read: bool = False
    cache_salt: bytes = b""
    deadline_ms: int = 0
    """0: the frontend's default."""
    priority: int = 0
    share_domain: str = ""
    """Whose queue it waits in; empty: the frontend's own. The server decides, never the caller."""
    traceparent: str = ""
    """Whose trace it belongs to; empty: one of its own, where tracing is on."""

    siblings: str = ""
    """Said by all replies to one prompt, so that a worker lets them share its pages."""

    def sibling(self, number: int) -> "Generation":
        """Return the request for another reply to the same prompt: `number` further in its seed."""
        seed = self.sampling.seed
        if seed is not None and seed + number >= 1 << 64:
            seed -= 1 << 64
        sampling = replace(self.sampling, seed=None if seed is None else seed + number)
        own_id = f"{self.request_id}-{number}" if number else self.request_id
        return replace(self, request_id=own_id, sampling=sampling, siblings=self.request_id)

    def __post_init__(self) -> None:
        given = sum(part is not None for part in (self.messages, self.text, self.tokens))
        if given != 1:
            raise BadInput("give exactly one of messages, text and tokens")
        if self.messages is not None:
            _check_messages(self.messages)
        if self.text is not None:
            _check_text(self.text, "text")
        if self.text == "" or (self.tokens is not None and not len(self.tokens)):
            raise BadInput("the prompt is empty")
        if len(self.stop) > MAX_STOPS:
            raise BadInput(f"{len(self.stop)} stop strings; {MAX_STOPS} allowed")
        if any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in self.stop):
            raise BadInput(f"a stop string has 1 to {MAX_STOP_CHARACTERS} characters")
        if self.shape is not None and self.sampling.ignore_eos:
            raise FieldError("ignore_eos: a reply with a form has to end", "ignore_eos")
        if len(self.cache_salt) > MAX_EXTRA_KEY_BYTES:
            raise TooLarge(f"cache_salt is over {MAX_EXTRA_KEY_BYTES} bytes")
        if not 0 <= self.deadline_ms <= MAX_DEADLINE_MS:
            raise BadInput(f"deadline_ms {self.deadline_ms} is over {MAX_DEADLINE_MS}")


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise BadInput("messages is empty: at least one is needed")
    if len(messages) > MAX_MESSAGES:
        raise TooLarge(f"{len(messages)} messages; {MAX_MESSAGES} allowed")
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            raise BadInput(
                f"messages[{number}].role {message.role!r} is none of {', '.join(sorted(ROLES))}"
            )
        _check_text(message.content, f"messages[{number}].content")


def _check_text(text: str, what: str) -> None:
    """Refuse lone surrogates: JSON can write them, and no UTF-8 text has them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{what} is not valid Unicode at character {error.start}") from None


@dataclass(frozen=True, slots=True)
class CacheAccount:
    """Where the prompt's tokens came from, as the worker counted them."""

    prompt_tokens: int
    by_tier: dict[TierKind, int]
    computed_tokens: int
    miss_reason: MissReason
    places: str

    @property
    def cached_tokens(self) -> int:
        """Return the prompt tokens that came from any cache."""
        return sum(self.by_tier.values())

    @classmethod
    def from_proto(cls, report: types_pb2.CacheReport) -> "CacheAccount":
        """Return the account in a worker's reply."""
        return cls(
            prompt_tokens=report.prompt_tokens,
            by_tier={
                TierKind.HBM: report.hbm_tokens,
                TierKind.DRAM: report.dram_tokens,
                TierKind.NVME: report.nvme_tokens,
                TierKind.PEER: report.peer_tokens,
                TierKind.FILES: report.files_tokens,
            },
            computed_tokens=report.computed_tokens,
            miss_reason=_miss_reason(report.miss_reason),
            places=report.places,
        )

    def to_proto(self) -> types_pb2.CacheReport:
        """Return the wire form."""
        return types_pb2.CacheReport(
            prompt_tokens=self.prompt_tokens,
            hbm_tokens=self.by_tier[TierKind.HBM],
            dram_tokens=self.by_tier[TierKind.DRAM],
            nvme_tokens=self.by_tier[TierKind.NVME],
            peer_tokens=self.by_tier[TierKind.PEER],
            files_tokens=self.by_tier[TierKind.FILES],
            computed_tokens=self.computed_tokens,
            miss_reason=types_pb2.MissReason.Name(int(self.miss_reason)),
            places=self.places,
        )


def _miss_reason(number: int) -> MissReason:
    """Return the reason with this number; a newer worker's unknown one is shown as ABSENT."""
    try:
        return MissReason(number)
    except ValueError:
        return MissReason.ABSENT


@dataclass(frozen=True, slots=True)
class TokenChance:
    """One generated token's log-probability; `top` has it again, and then the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What became known since the last one."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    chances: tuple[TokenChance, ...] = ()
    cache: CacheAccount | None = None
    """With the first tokens."""
    ttft_ms: float = 0.0
    """With the first tokens; at the frontend, from arrival."""
    worker: str = ""
    """Who gave these tokens."""
    prefill_worker: str = ""
    """Who computed the prompt; with the account."""
    output_tokens: int = 0
    """So far."""
    retries: int = 0
    """Workers lost on the way, so far."""
    finish_reason: str = ""
    """With the last one: `stop` or `length`."""


def chances_of(reply: worker_pb2.RunReply) -> tuple[TokenChance, ...]:
    """Return the log-probabilities in a worker's message."""
    return tuple(
        TokenChance(
            token=entry.token_ids[0],
            logprob=entry.logprobs[0],
            top=tuple(zip(entry.token_ids, entry.logprobs, strict=True)),
        )
        for entry in reply.logprobs
        if entry.token_ids
    )
