"""Log-probabilities in OpenAI's two forms: of chat, and the older one of completions. Pure."""

from collections.abc import Sequence
from typing import Any

from kvworkers.frontends.generation import TokenChance
from kvworkers.frontends.text import REPLACEMENT
from kvworkers.frontends.tokenizer import ChatTokenizer


def chat_logprobs(
    said: Sequence[TokenChance], tokenizer: ChatTokenizer, top: int
) -> dict[str, Any] | None:
    """Return log-probabilities as chat has them, each with the `top` likeliest tokens.

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


class LegacyLogprobs:
    """The older form: parallel lists, with the place of each token in its choice's text."""

    def __init__(self, tokenizer: ChatTokenizer, top: int, *, offset: int = 0) -> None:
        """`top` likeliest tokens besides the chosen one; `offset`: characters that stand before."""
        self._tokenizer = tokenizer
        self._top = top
        self._offset = offset

    def of(self, said: Sequence[TokenChance]) -> dict[str, Any] | None:
        """Return the lists for the tokens that come next; None when none were asked for."""
        if not said:
            return None
        made: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for one in said:
            made["tokens"].append(self._name(one.token))
            made["token_logprobs"].append(one.logprob)
            likeliest = [(one.token, one.logprob), *one.top[1 : self._top + 1]]
            made["top_logprobs"].append(
                {self._name(token): logprob for token, logprob in likeliest} if self._top else None
            )
            made["text_offset"].append(self._offset)
            self._offset += len(self._tokenizer.show(one.token))
        return made

    def _name(self, token: int) -> str:
        """Return the token's text, or its id where it is part of a character: keys must differ."""
        text = self._tokenizer.show(token)
        return f"token_id:{token}" if REPLACEMENT in text else text
