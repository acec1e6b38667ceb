"""OpenAI's chat wire format: what comes in, checked, and what goes out. Pure.

Ours besides: in a request `top_k`, `ignore_eos`, `stop_token_ids` and an object `kvstore` with
`no_store`, `no_read`, `kind`, `cache_salt`; in the reply or its last chunk that of `extension`.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvstore.core.errors import (
    BadInput,
    Forbidden,
    KvStoreError,
    NotFound,
    Refused,
    TooLarge,
    Unauthenticated,
    Unreachable,
    Unsupported,
)
from kvworkers.frontends.door import Draining
from kvworkers.frontends.generation import Chunk, Generation, SamplingChoice, TokenChance
from kvworkers.frontends.text import REPLACEMENT
from kvworkers.frontends.tokenizer import ChatTokenizer, Message

_STATUS: Final[tuple[tuple[type[KvStoreError], int, str], ...]] = (
    (Unauthenticated, 401, "authentication_error"),
    (Forbidden, 403, "permission_error"),
    (NotFound, 404, "invalid_request_error"),
    (BadInput, 400, "invalid_request_error"),
    (Unsupported, 400, "invalid_request_error"),
    (Draining, 503, "service_unavailable"),
    (Refused, 429, "rate_limit_error"),
    (Unreachable, 503, "service_unavailable"),
)
"""Subclasses before their bases; anything else is 500."""

_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}
"""Fields we do not serve, and the values that ask for nothing: others are refused, not ignored."""


class TextPart(BaseModel):
    """A part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn as OpenAI's clients send it."""

    role: str
    content: str | list[TextPart] | None = None

    def turn(self) -> Message:
        """Return the turn; the newer name of the system role becomes the one templates know."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return Message("system" if self.role == "developer" else self.role, content)


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


class ChatBody(BaseModel):
    """The body of POST /v1/chat/completions. Unknown fields are ignored, as OpenAI's servers do."""

    model_config = ConfigDict(extra="allow", strict=False)

    model: str
    messages: list[ChatMessage]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    logprobs: bool | None = None
    top_logprobs: int | None = None
    kvstore: CacheOptions = Field(default_factory=CacheOptions)

    def generation(self, request_id: str) -> Generation:
        """Return the request that this body asks for; raises `BadInput` naming a field."""
        for name, neutral in _NEUTRAL.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in neutral:
                raise FieldError(f"{name} {value!r} is not supported", name)
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise FieldError(
                f"top_logprobs must not be negative: {self.top_logprobs}", "top_logprobs"
            )
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs needs logprobs to be true", "top_logprobs")
        return Generation(
            request_id=request_id,
            model=self.model,
            messages=[message.turn() for message in self.messages],
            sampling=self._sampling(),
            stop=tuple([self.stop] if isinstance(self.stop, str) else self.stop or []),
            no_store=self.kvstore.no_store,
            kind=self.kvstore.kind,
            no_read=self.kvstore.no_read,
            cache_salt=self.kvstore.cache_salt.encode(),
        )

    def _sampling(self) -> SamplingChoice:
        newer = self.max_completion_tokens
        return SamplingChoice(
            max_tokens=self.max_tokens if newer is None else newer,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0) if self.top_k == -1 else self.top_k or 0,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=max(1, self.top_logprobs or 0) if self.logprobs else 0,
        )


class FieldError(BadInput):
    """A caller's mistake in one named field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param or None


def parse(raw: bytes) -> ChatBody:
    """Return the body; raises `BadInput` for anything that is not one."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"the body is not valid UTF-8 at byte {error.start}") from None
    try:
        return ChatBody.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        what = f"{param}: {first['msg']}" if param else f"the body is no request: {first['msg']}"
        raise FieldError(what, param) from None


def failure(error: KvStoreError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return status, body and headers that tell a client about an error."""
    status, kind = next(
        ((status, kind) for cls, status, kind in _STATUS if isinstance(error, cls)),
        (500, "server_error"),
    )
    code: str | None = None
    headers: dict[str, str] = {}
    if isinstance(error, TooLarge):
        code = "context_length_exceeded"
    elif isinstance(error, NotFound):
        code = "model_not_found"
    elif isinstance(error, Refused):
        code = None if isinstance(error, Draining) else "rate_limit_exceeded"
        headers["Retry-After"] = str(max(1, -(-error.retry_after_ms // 1_000)))
    param = error.param if isinstance(error, FieldError) else None
    body = {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
    return status, body, headers


class ChatReply:
    """Builds the replies of one request: pieces of a stream, or the whole."""

    def __init__(
        self,
        *,
        model: str,
        request_id: str,
        created: int,
        prompt_tokens: int,
        top_logprobs: int = 0,
    ) -> None:
        self._base = {"id": f"chatcmpl-{request_id}", "created": created, "model": model}
        self._prompt_tokens = prompt_tokens
        self._top = top_logprobs
        self._cached_tokens = 0

    def opening(self) -> dict[str, Any]:
        """Return the first piece of a stream: who speaks."""
        return self._piece({"role": "assistant", "content": ""}, None, None)

    def piece(self, chunk: Chunk, tokenizer: ChatTokenizer) -> dict[str, Any]:
        """Return one piece of a stream; the last one carries the cache's account."""
        self._note(chunk)
        delta = {"content": chunk.text} if chunk.text else {}
        logprobs = chances(chunk.chances, tokenizer, self._top)
        made = self._piece(delta, chunk.finish_reason or None, logprobs)
        if chunk.finish_reason:
            made["kvstore"] = extension(chunk)
        return made

    def usage_piece(self, output_tokens: int) -> dict[str, Any]:
        """Return the piece after the last, for `stream_options.include_usage`."""
        made = self._piece({}, None, None)
        made["choices"] = []
        made["usage"] = self._usage(output_tokens)
        return made

    def whole(self, chunks: Sequence[Chunk], tokenizer: ChatTokenizer) -> dict[str, Any]:
        """Return the one reply of a request that does not stream."""
        for chunk in chunks:
            self._note(chunk)
        last = chunks[-1]
        text = "".join(chunk.text for chunk in chunks)
        said = [chance for chunk in chunks for chance in chunk.chances]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": last.finish_reason,
            "logprobs": chances(said, tokenizer, self._top),
        }
        return self._base | {
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(last.output_tokens),
            "kvstore": extension(last),
        }

    def _note(self, chunk: Chunk) -> None:
        if chunk.cache is not None:
            self._cached_tokens = chunk.cache.cached_tokens

    def _piece(
        self, delta: dict[str, Any], reason: str | None, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return self._base | {"object": "chat.completion.chunk", "choices": [choice]}

    def _usage(self, output_tokens: int) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": self._prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


def extension(chunk: Chunk) -> dict[str, Any]:
    """Return what we say beyond OpenAI's fields, from the last chunk of a reply."""
    cache = chunk.cache
    return {
        "cached_tokens": (
            {tier.name.lower(): tokens for tier, tokens in cache.by_tier.items()} if cache else {}
        ),
        "computed_tokens": cache.computed_tokens if cache else 0,
        "miss_reason": cache.miss_reason.name.lower() if cache else "",
        "places": cache.places if cache else "",
        "ttft_ms": round(chunk.ttft_ms, 3),
        "worker": chunk.worker,
        "retries": chunk.retries,
    }


def chances(
    said: Sequence[TokenChance], tokenizer: ChatTokenizer, top: int
) -> dict[str, Any] | None:
    """Return log-probabilities in OpenAI's form, each with the `top` likeliest tokens.

    None when none were asked for.
    """
    if not said:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.show(token)
        # A part of a character decodes to a replacement, whose bytes are not the token's.
        known = None if REPLACEMENT in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}

    return {
        "content": [
            entry(one.token, one.logprob)
            # The chosen token stands before the likeliest ones.
            | {"top_logprobs": [entry(token, logprob) for token, logprob in one.top[1 : top + 1]]}
            for one in said
        ],
        "refusal": None,
    }
