"""OpenAI's chat wire format: what comes in, checked, and what goes out. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from kvworkers.frontends.generation import Chunk, FieldError, Generation, Shape
from kvworkers.frontends.grammars import json_shape
from kvworkers.frontends.messages import Message, Tool
from kvworkers.frontends.openai.chances import chat_logprobs
from kvworkers.frontends.openai.fields import SharedFields
from kvworkers.frontends.openai.tools import (
    Choice,
    MessageCall,
    SaidAndCalled,
    ToolDefinition,
    offered,
    shape_of,
)
from kvworkers.frontends.openai.usage import Usage, by_choice, extension
from kvworkers.frontends.running import Running
from kvworkers.frontends.tokenizer import ChatTokenizer


class TextPart(BaseModel):
    """A part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn as OpenAI's clients send it."""

    role: str
    content: str | list[TextPart] | None = None
    tool_calls: list[MessageCall] | None = None

    def turn(self, at: int) -> Message:
        """Return the turn; the newer name of the system role becomes the one templates know.

        `at` is its place among the messages. Raises `FieldError` for a call that is none.
        """
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        calls = tuple(
            call.call(f"messages.{at}.tool_calls.{place}")
            for place, call in enumerate(self.tool_calls or ())
        )
        return Message("system" if self.role == "developer" else self.role, content, calls)


class NamedSchema(BaseModel):
    """A JSON schema, as `response_format` has it."""

    name: str = ""
    schema_: Any = Field(alias="schema")


class ResponseFormat(BaseModel):
    """What the reply has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def shape(self) -> Shape | None:
        """Return what the reply has to follow; raises `FieldError` where the schema is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return json_shape({"type": "object"}, "response_format")
        if self.json_schema is None:
            place = "response_format.json_schema"
            raise FieldError(f"{place} is missing", place)
        return json_shape(self.json_schema.schema_, "response_format.json_schema.schema")


class ChatBody(SharedFields):
    """The body of POST /v1/chat/completions."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SharedFields.NEUTRAL,
        "best_of": (1,),
        "functions": ([],),
        "modalities": (["text"],),
        "audio": (),
    }

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[ToolDefinition] = Field(default_factory=list)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None

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
        tools = offered(self.tools, self.tool_choice)
        made = Generation(
            request_id=request_id,
            messages=[message.turn(at) for at, message in enumerate(self.messages)],
            tools=tools,
            shape=self._shape(tools),
            sampling=self.sampling(
                self.max_tokens if newer is None else newer,
                max(1, self.top_logprobs or 0) if self.logprobs else 0,
            ),
            **self.shared(),
        )
        return [made]

    def _shape(self, tools: Sequence[Tool]) -> Shape | None:
        wanted = self.response_format.shape() if self.response_format is not None else None
        calls = shape_of(tools, self.tool_choice, parallel=self.parallel_tool_calls is not False)
        if wanted is not None and calls is not None:
            raise FieldError("response_format with tools is not supported", "response_format")
        return wanted or calls

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
        self._heard = [SaidAndCalled() if one.request.tools else None for one in runs]
        """Where there are tools: what each choice says and calls."""

    def opening(self) -> list[dict[str, Any]]:
        """Return the first pieces of a stream: who speaks."""
        who = {"role": "assistant", "content": ""}
        return [self._piece(number, who) for number in range(self._choices)]

    def pieces(self, number: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Return a stream's pieces of a chunk; a choice's last one has the cache's account."""
        self._usage.note(number, chunk)
        heard, reason = self._heard[number], chunk.finish_reason or None
        if heard is None:
            deltas = [{"content": chunk.text}] if chunk.text else []
        else:
            deltas = heard.push(chunk.text, last=reason is not None)
            reason = reason and heard.ended(reason)
        # Half a character is no text yet; clients need no empty piece for it.
        if not deltas and (reason or chunk.chances):
            deltas = [{}]
        logprobs = chat_logprobs(chunk.chances, self._tokenizer, self._top)
        made = [self._piece(number, delta) for delta in deltas]
        if made:
            made[0]["choices"][0]["logprobs"] = logprobs
        if reason:
            made[-1]["choices"][0]["finish_reason"] = reason
            made[-1]["kvstore"] = extension(chunk)
        return made

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
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        heard, reason = self._heard[number], chunks[-1].finish_reason
        if heard is not None:
            heard.push(text, last=True)
            reason = heard.ended(reason)
            message["content"] = heard.text
            if heard.calls:
                message |= {"content": heard.text or None, "tool_calls": heard.calls}
        made = {
            "index": number,
            "message": message,
            "finish_reason": reason,
            "logprobs": chat_logprobs(said, self._tokenizer, self._top),
        }
        return made | ({"kvstore": extension(chunks[-1])} if self._choices > 1 else {})

    def _piece(self, number: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "finish_reason": None, "logprobs": None}
        return self._base | {"object": "chat.completion.chunk", "choices": [choice]}
