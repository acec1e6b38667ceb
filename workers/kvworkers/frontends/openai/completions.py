"""OpenAI's older wire format, without turns: prompts in as text or token ids, text out. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import ValidationError, ValidatorFunctionWrapHandler, field_validator

from kvworkers.frontends.generation import Chunk, FieldError, Generation
from kvworkers.frontends.openai.chances import LegacyLogprobs
from kvworkers.frontends.openai.fields import MAX_CHOICES, SharedFields
from kvworkers.frontends.openai.usage import Usage, by_choice, extension
from kvworkers.frontends.running import Running
from kvworkers.frontends.tokenizer import ChatTokenizer


class CompletionBody(SharedFields):
    """The body of POST /v1/completions."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SharedFields.NEUTRAL,
        "best_of": (1,),
        "suffix": ("",),
        "prompt_logprobs": (),
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
    }

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool = False
    logprobs: int | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _one_of_four(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise ValueError("must be a text, texts, token ids or lists of token ids") from None

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts; raises `FieldError` where there are none, or too many."""
        if not self.prompt:
            raise FieldError("prompt is empty", "prompt")
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            made: list[Any] = [self.prompt]
        else:
            made = list(self.prompt)
        if len(made) * self.choices > MAX_CHOICES:
            wanted = f"{len(made)} prompts with n {self.choices}"
            raise FieldError(f"{wanted} make over {MAX_CHOICES} choices", "prompt")
        return made

    def generations(self, request_id: str) -> list[Generation]:
        """Return one request for each prompt; raises `BadInput` naming a field."""
        self.check()
        if self.logprobs is not None and self.logprobs < 0:
            raise FieldError(f"logprobs must not be negative: {self.logprobs}", "logprobs")
        if self.echo and self.logprobs is not None:
            raise FieldError(
                "echo with logprobs is not supported: a prompt's tokens have no log-probabilities"
                " here",
                "echo",
            )
        sampling = self.sampling(
            self.max_tokens, 0 if self.logprobs is None else max(1, self.logprobs)
        )
        prompts = self.prompts()
        return [
            Generation(
                request_id=request_id if len(prompts) == 1 else f"{request_id}-p{number}",
                text=prompt if isinstance(prompt, str) else None,
                tokens=None if isinstance(prompt, str) else prompt,
                sampling=sampling,
                **self.shared(),
            )
            for number, prompt in enumerate(prompts)
        ]

    def reply(
        self, groups: Sequence[Sequence[Running]], tokenizer: ChatTokenizer, *, created: int
    ) -> "CompletionReply":
        """Return what builds the reply of the prepared requests."""
        return CompletionReply(self, groups, tokenizer, created=created)


class CompletionReply:
    """Builds the replies of one request: pieces of a stream, or the whole."""

    def __init__(
        self, body: CompletionBody, groups: Sequence[Sequence[Running]], tokenizer: ChatTokenizer,
        *, created: int,
    ) -> None:  # fmt: skip
        """`groups` has the choices of each prompt."""
        self._base = {
            "id": f"cmpl-{groups[0][0].request.request_id.removesuffix('-p0')}",
            "object": "text_completion",
            "created": created,
            "model": groups[0][0].offer.model,
        }
        choices = [running for group in groups for running in group]
        self._many = len(choices) > 1
        self._echoes = [_text_of(one, tokenizer) if body.echo else "" for one in choices]
        """What each choice still has to begin with."""
        self._logprobs = [LegacyLogprobs(tokenizer, body.logprobs or 0) for _ in choices]
        self._usage = Usage([len(group[0].prompt) for group in groups], body.choices)

    def opening(self) -> list[dict[str, Any]]:
        """Return the first pieces of a stream: none, here the text comes at once."""
        return []

    def pieces(self, number: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Return a stream's pieces of a chunk; a choice's last one has the cache's account."""
        self._usage.note(number, chunk)
        text = self._echoes[number] + chunk.text
        if not (text or chunk.finish_reason or chunk.chances):
            return []
        self._echoes[number] = ""
        made = self._base | {"choices": [self._choice(number, text, [chunk])]}
        return [made | ({"kvstore": extension(chunk)} if chunk.finish_reason else {})]

    def usage_piece(self) -> dict[str, Any]:
        """Return the piece after the last, for `stream_options.include_usage`."""
        return self._base | {"choices": [], "usage": self._usage.as_json()}

    def whole(self, chunks: Sequence[tuple[int, Chunk]]) -> dict[str, Any]:
        """Return the one reply of a request that does not stream."""
        for number, chunk in chunks:
            self._usage.note(number, chunk)
        choices = []
        every = by_choice(chunks)
        for number, said in enumerate(every):
            text = self._echoes[number] + "".join(chunk.text for chunk in said)
            choice = self._choice(number, text, said)
            choices.append(choice | ({"kvstore": extension(said[-1])} if self._many else {}))
        return self._base | {
            "choices": choices,
            "usage": self._usage.as_json(),
            "kvstore": extension(every[0][-1]),
        }

    def _choice(self, number: int, text: str, chunks: Sequence[Chunk]) -> dict[str, Any]:
        said = [chance for chunk in chunks for chance in chunk.chances]
        return {
            "index": number,
            "text": text,
            "logprobs": self._logprobs[number].of(said),
            "finish_reason": chunks[-1].finish_reason or None,
        }


def _text_of(running: Running, tokenizer: ChatTokenizer) -> str:
    """Return a prompt as its caller wrote it, or what its tokens say."""
    text = running.request.text
    return tokenizer.decode(running.prompt) if text is None else text
