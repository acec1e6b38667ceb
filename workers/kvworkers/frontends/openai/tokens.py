"""Text to token ids and back, as vLLM's server has it: `/tokenize` and `/detokenize`."""

from typing import Any

from pydantic import BaseModel, Field

from kvstore.core.errors import TooLarge
from kvstore.core.limits import MAX_PROMPT_TOKENS
from kvworkers.frontends.generation import FieldError, Generation
from kvworkers.frontends.openai.chat import ChatMessage
from kvworkers.frontends.openai.tools import ToolDefinition, offered
from kvworkers.frontends.pipeline import Pipeline


class TokenizeBody(BaseModel):
    """The body of POST /tokenize: `prompt` or `messages`."""

    model: str = ""
    """Empty: the only one."""
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    """Of a prompt: with those that the model starts with. A template writes its own."""
    add_generation_prompt: bool = True
    """Of messages: up to where the assistant speaks."""
    tools: list[ToolDefinition] = Field(default_factory=list)
    return_token_strs: bool = False

    async def answer(self, pipeline: Pipeline) -> dict[str, Any]:
        """Return the tokens; raises `BadInput`, or `NotFound` for an unknown model.

        More tokens than any prompt may have are a `FieldError`: a body of a few MiB has millions.
        """
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("give exactly one of prompt and messages", "prompt")
        offer, tokenizer = pipeline.fleet.offer(self.model), pipeline.tokenizer
        if self.messages is not None:
            turns = [message.turn(at) for at, message in enumerate(self.messages)]
            tools = offered(self.tools, None)
            Generation(request_id="", messages=turns)  # checked like one that is to be answered
            tokens = await tokenizer.conversation(turns, tools, opened=self.add_generation_prompt)
        else:
            assert self.prompt is not None, "one of both, checked above"
            if self.prompt:
                Generation(request_id="", text=self.prompt)
            tokens = await tokenizer.text(self.prompt, special=self.add_special_tokens)
        if len(tokens) > MAX_PROMPT_TOKENS:
            field = "messages" if self.messages is not None else "prompt"
            what = f"{field}: {len(tokens)} tokens; {MAX_PROMPT_TOKENS} allowed"
            raise FieldError(what, field)
        shown = await tokenizer.shown_each(tokens) if self.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": offer.max_model_tokens,
            "tokens": tokens.tolist(),
            "token_strs": shown,
        }


class DetokenizeBody(BaseModel):
    """The body of POST /detokenize."""

    model: str = ""
    tokens: list[int] = Field(default_factory=list)

    async def answer(self, pipeline: Pipeline) -> dict[str, Any]:
        """Return the text, special tokens shown; raises `BadInput` for what is no token."""
        pipeline.fleet.offer(self.model)
        if len(self.tokens) > MAX_PROMPT_TOKENS:
            raise TooLarge(f"{len(self.tokens)} tokens; {MAX_PROMPT_TOKENS} allowed")
        limit = pipeline.tokenizer.vocabulary
        wrong = next((one for one in self.tokens if not 0 <= one < limit), None)
        if wrong is not None:
            raise FieldError(f"token id {wrong} is outside the vocabulary of {limit}", "tokens")
        return {"prompt": await pipeline.tokenizer.shown(self.tokens)}
