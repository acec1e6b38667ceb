"""What the bodies of both endpoints have in common, checked. Pure.

Ours besides OpenAI's: `top_k`, `min_p`, `ignore_eos`, `stop_token_ids` and an object `kvstore` with
`no_store`, `no_read`, `kind`, `cache_salt`.
"""

import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvstore.core.errors import BadInput
from kvworkers.frontends.generation import FieldError, SamplingChoice

MAX_CHOICES: Final = 128
"""Replies of one request, over all of its prompts."""

_GUIDED: Final = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_json_object",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "structured_outputs",
)
"""vLLM's names for the form of a reply; whoever gives one counts on it."""

Body = TypeVar("Body", bound=BaseModel)


class StreamOptions(BaseModel):
    """What a stream should carry besides text."""

    include_usage: bool = False


class CacheOptions(BaseModel):
    """Ours: how this request uses the cache."""

    model_config = ConfigDict(extra="forbid")

    no_store: bool = False
    kind: str = ""
    no_read: bool = False
    cache_salt: str = ""


class SharedFields(BaseModel):
    """The fields of both endpoints. Unknown ones are ignored, as OpenAI's servers do."""

    model_config = ConfigDict(extra="allow", strict=False)

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = dict.fromkeys(_GUIDED, ())
    """Fields we do not serve, and the values that ask for nothing: others are refused."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    min_p: float | None = None
    logit_bias: dict[int, float] | None = None
    cache_salt: str | None = None
    """As vLLM has it; the same as `kvstore.cache_salt`."""
    kvstore: CacheOptions = Field(default_factory=CacheOptions)

    @property
    def choices(self) -> int:
        """How many replies are wanted to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raise `FieldError` for a field that asks for what is not served."""
        for name, neutral in self.NEUTRAL.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in neutral:
                raise FieldError(f"{name} {reprlib.repr(value)} is not supported", name)
        if not 1 <= self.choices <= MAX_CHOICES:
            raise FieldError(f"n must lie in 1 to {MAX_CHOICES}, got {self.n}", "n")
        if self.cache_salt and self.kvstore.cache_salt not in ("", self.cache_salt):
            raise FieldError("cache_salt differs from kvstore.cache_salt", "cache_salt")

    def shared(self) -> dict[str, Any]:
        """Return the fields of a `Generation` that both endpoints fill alike."""
        return {
            "model": self.model,
            "stop": tuple([self.stop] if isinstance(self.stop, str) else self.stop or []),
            "no_store": self.kvstore.no_store,
            "kind": self.kvstore.kind,
            "no_read": self.kvstore.no_read,
            "cache_salt": (self.cache_salt or self.kvstore.cache_salt).encode(),
        }

    def sampling(self, max_tokens: int | None, logprobs: int) -> SamplingChoice:
        """Return how tokens are chosen; `logprobs` as `SamplingChoice` takes it."""
        return SamplingChoice(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0) if self.top_k == -1 else self.top_k or 0,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            min_p=self.min_p or 0.0,
            logit_bias=tuple((self.logit_bias or {}).items()),
            logprobs=logprobs,
        )


def parse(raw: bytes, kind: type[Body]) -> Body:
    """Return the body of this kind; raises `BadInput` for anything that is not one."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"the body is not valid UTF-8 at byte {error.start}") from None
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        what = f"{param}: {first['msg']}" if param else f"the body is no request: {first['msg']}"
        raise FieldError(what, param) from None
