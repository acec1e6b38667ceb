"""How the next token is chosen from a row of logits.

Greedy is exact: the largest logit, ties to the lowest id. Everything else draws from a
generator that starts anew from seed and position for each token. So a seed gives the same tokens
whatever runs beside it, and also where another worker goes on with a reply that one began.

    logits ─▶ penalties, biases ─▶ constraint ─▶ temperature ─▶ min_p, top_k, top_p ─▶ draw
"""

import hashlib
import math
import secrets
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch
from torch import Tensor

from kvstore.core.errors import BadInput

GREEDY_BELOW: Final = 1e-4
"""Temperatures under this are greedy: dividing by them would overflow float32."""
MAX_LOGPROBS: Final = 20
MAX_STOP_TOKENS: Final = 64
MAX_TEMPERATURE: Final = 100.0
MAX_PENALTY: Final = 2.0
MAX_BIAS: Final = 100.0
MAX_BIASES: Final = 1_024
_MASK_64: Final = (1 << 64) - 1


class Constraint(Protocol):
    """What a reply has to follow; one request's, and told of every token that was chosen."""

    def allow(self, logits: Tensor) -> Tensor:
        """Return `logits` [vocab] with minus infinity where a token must not come next.

        At least one stays.
        """
        ...

    def take(self, token: int) -> None:
        """Go on behind this token."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a request asks for; raises `BadInput` naming the field at fault."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int = 0
    """How many top log-probabilities come with each token; 0: none."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_p: float = 0.0
    """Tokens with less than this share of the likeliest one's probability are left out; 0: off."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits; the ids lie in the model's vocabulary."""
    said: tuple[int, ...] = ()
    """The reply's tokens that the prompt ends with: another worker began it."""
    constraint: Constraint | None = None
    """Stands behind `said` already."""

    def __post_init__(self) -> None:
        if self.max_tokens <= 0:
            raise BadInput(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= MAX_TEMPERATURE):
            raise BadInput(
                f"temperature must be in [0, {MAX_TEMPERATURE:g}], got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:  # false for NaN too
            raise BadInput(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise BadInput(f"top_k must not be negative, got {self.top_k}")
        if not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise BadInput(f"logprobs must be in [0, {MAX_LOGPROBS}], got {self.logprobs}")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise BadInput(f"{len(self.stop_token_ids)} stop tokens; {MAX_STOP_TOKENS} allowed")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -MAX_PENALTY <= getattr(self, name) <= MAX_PENALTY:
                raise BadInput(
                    f"{name} must be in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}],"
                    f" got {getattr(self, name)}"
                )
        if not 0 <= self.min_p <= 1:
            raise BadInput(f"min_p must be in [0, 1], got {self.min_p}")
        if len(self.logit_bias) > MAX_BIASES:
            raise BadInput(f"logit_bias has {len(self.logit_bias)} tokens; {MAX_BIASES} allowed")
        if any(not -MAX_BIAS <= bias <= MAX_BIAS for _, bias in self.logit_bias):
            raise BadInput(f"logit_bias must be in [-{MAX_BIAS:g}, {MAX_BIAS:g}]")

    @property
    def penalised(self) -> bool:
        """Whether what was generated makes itself less likely, or more."""
        return bool(self.frequency_penalty or self.presence_penalty)

    @property
    def shaped(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return self.penalised or bool(self.logit_bias) or self.constraint is not None

    @property
    def greedy(self) -> bool:
        """Whether the choice needs no random numbers."""
        return self.temperature < GREEDY_BELOW

    @property
    def only_id(self) -> bool:
        """Whether all that is wanted is the largest logit's id: it is found where they lie."""
        return self.greedy and not self.logprobs and not self.shaped


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of one position under the model itself (before temperature)."""

    token_ids: tuple[int, ...]
    """The chosen token first, then the most likely ones in descending order."""
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token."""

    token: int
    logprobs: Logprobs | None = None
    logits: Tensor | None = field(default=None, compare=False, repr=False)
    """The row that it was chosen from, on the host, where others choose from it as well."""


class Sampler:
    """Chooses tokens of one request, one after the other: it remembers what penalties go by."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._counts = Counter(params.said if params.penalised else ())
        self._generator: torch.Generator | None = None
        self._seed = b""
        if not params.greedy:
            self._generator = torch.Generator()
            seed = params.seed if params.seed is not None else secrets.randbits(64)
            self._seed = (seed & _MASK_64).to_bytes(8, "little")

    def sample(self, logits: Tensor, *, position: int) -> Sampled:
        """Choose from `logits` [vocab] float32, all finite.

        `position` is where the token will stand, counted from the start of the prompt.
        """
        if self._generator is not None:
            # Hashed: generators that start from neighbouring numbers begin alike.
            state = hashlib.sha256(self._seed + position.to_bytes(8, "little")).digest()
            self._generator.manual_seed(int.from_bytes(state[:8], "little") >> 1)
        token = self._choose(self._shape(logits) if self.params.shaped else logits)
        if self.params.penalised:
            self._counts[token] += 1
        if self.params.constraint is not None:
            self.params.constraint.take(token)
        wanted = self.params.logprobs
        return Sampled(token, top_logprobs(logits, token, wanted) if wanted else None)

    def _shape(self, logits: Tensor) -> Tensor:
        params, shaped = self.params, logits.clone()
        if self._counts:
            times = torch.tensor(list(self._counts.values()), dtype=shaped.dtype)
            less = params.frequency_penalty * times + params.presence_penalty
            shaped[torch.tensor(list(self._counts))] -= less
        if params.logit_bias:
            ids, biases = zip(*params.logit_bias, strict=True)
            shaped[torch.tensor(ids)] += torch.tensor(biases, dtype=shaped.dtype)
        return shaped if params.constraint is None else params.constraint.allow(shaped)

    def _choose(self, logits: Tensor) -> int:
        params = self.params
        if self._generator is None:
            return int(torch.argmax(logits))  # the first of equal maxima, as documented
        scaled = logits / params.temperature
        if params.min_p:
            least = scaled.max() + math.log(params.min_p)
            scaled = scaled.masked_fill(scaled < least, -math.inf)
        kept = params.top_k if 0 < params.top_k < scaled.numel() else scaled.numel()
        if kept == scaled.numel() and params.top_p >= 1:
            probabilities = torch.softmax(scaled, dim=-1)
            return int(torch.multinomial(probabilities, 1, generator=self._generator))
        values, ids = torch.topk(scaled, kept, sorted=True)
        probabilities = torch.softmax(values, dim=-1)
        if params.top_p < 1:
            before = torch.cumsum(probabilities, dim=-1) - probabilities
            # The first token whose predecessors reach top_p ends the nucleus; one always stays.
            probabilities = torch.where(before < params.top_p, probabilities, 0.0)
        return int(ids[torch.multinomial(probabilities, 1, generator=self._generator)])


def top_logprobs(logits: Tensor, chosen: int, count: int) -> Logprobs:
    """Return log-probabilities of `chosen` and of the `count` most likely tokens."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = torch.topk(logprobs, min(count, logprobs.numel()), sorted=True)
    return Logprobs(
        token_ids=(chosen, *ids.tolist()), values=(float(logprobs[chosen]), *values.tolist())
    )
