"""OpenAI's chat wire format: what comes in, checked, and what goes out. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from kvworkers.frontends.generation import Chunk, FieldError, Generation
from kvworkers.frontends.openai.chances import chat_logprobs
from kvworkers.frontends.openai.fields import SharedFields
from kvworkers.frontends.openai.usage import Usage, by_choice, extension
from kvworkers.frontends.running import Running
from kvworkers.frontends.tokenizer import ChatTokenizer, Message


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


class ChatBody(SharedFields):
    """The body of POST /v1/chat/completions."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
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

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def generations(self, request_id: str) -> list[Generation]:
        """Return the one request that this body asks for; raises `BadInput` naming a field."""
        self.check()
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise FieldError(
                f"top_logprobs must not be negative: {self.top_logprobs}", "top_logprobs"
            )
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs needs logprobs to be true", "top_logprobs")
        newer = self.max_completion_tokens
        made = Generation(
            request_id=request_id,
            messages=[message.turn() for message in self.messages],
            sampling=self.sampling(
                self.max_tokens if newer is None else newer,
                max(1, self.top_logprobs or 0) if self.logprobs else 0,
            ),
            **self.shared(),
        )
        return [made]

    def reply(
        self, groups: Sequence[Sequence[Running]], tokenizer: ChatTokenizer, *, created: int
    ) -> "ChatReply":
        """Return what builds the reply of the prepared request."""
        return ChatReply(self, groups[0], tokenizer, created=created)


class ChatReply:
    """Builds the replies of one request: pieces of a stream, or the whole."""

    def __init__(
        self, body: ChatBody, runs: Sequence[Running], tokenizer: ChatTokenizer, *, created: int
    ) -> None:
        """`runs` are the choices."""
        first = runs[0]
        self._base = {
            "id": f"chatcmpl-{first.request.request_id}",
            "created": created,
            "model": first.offer.model,
        }
        self._choices = len(runs)
        self._top = body.top_logprobs or 0
        self._tokenizer = tokenizer
        self._usage = Usage([len(first.prompt)], len(runs))

    def opening(self) -> list[dict[str, Any]]:
        """Return the first pieces of a stream: who speaks."""
        who = {"role": "assistant", "content": ""}
        return [self._piece(number, who, None, None) for number in range(self._choices)]

    def pieces(self, number: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Return a stream's pieces of a chunk; a choice's last one has the cache's account."""
        self._usage.note(number, chunk)
        # Half a character is no text yet; clients need no empty piece for it.
        if not (chunk.text or chunk.finish_reason or chunk.chances):
            return []
        delta = {"content": chunk.text} if chunk.text else {}
        logprobs = chat_logprobs(chunk.chances, self._tokenizer, self._top)
        made = self._piece(number, delta, chunk.finish_reason or None, logprobs)
        if chunk.finish_reason:
            made["kvstore"] = extension(chunk)
        return [made]

    def usage_piece(self) -> dict[str, Any]:
        """Return the piece after the last, for `stream_options.include_usage`."""
        made = self._base | {"object": "chat.completion.chunk", "choices": []}
        return made | {"usage": self._usage.as_json()}

    def whole(self, chunks: Sequence[tuple[int, Chunk]]) -> dict[str, Any]:
        """Return the one reply of a request that does not stream."""
        for number, chunk in chunks:
            self._usage.note(number, chunk)
        every = by_choice(chunks)
        return self._base | {
            "object": "chat.completion",
            "choices": [self._choice(number, said) for number, said in enumerate(every)],
            "usage": self._usage.as_json(),
            "kvstore": extension(every[0][-1]),
        }

    def _choice(self, number: int, chunks: Sequence[Chunk]) -> dict[str, Any]:
        text = "".join(chunk.text for chunk in chunks)
        said = [chance for chunk in chunks for chance in chunk.chances]
        made = {
            "index": number,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": chunks[-1].finish_reason,
            "logprobs": chat_logprobs(said, self._tokenizer, self._top),
        }
        return made | ({"kvstore": extension(chunks[-1])} if self._choices > 1 else {})

    def _piece(
        self, number: int, delta: dict[str, Any], reason: str | None,
        logprobs: dict[str, Any] | None,
    ) -> dict[str, Any]:  # fmt: skip
        choice = {"index": number, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return self._base | {"object": "chat.completion.chunk", "choices": [choice]}
