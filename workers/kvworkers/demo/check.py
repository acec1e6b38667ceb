"""Holds every reply against the plain model of `transformers`, which has no cache at all.

One forward pass over prompt and reply gives the plain model's choice at every place of the
reply. The reply is the plain model's own greedy reply exactly when each choice is the token that
stands there: the first choice follows from the prompt alone, the second from the prompt and
that same first token, and so on. It costs one pass instead of one per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvworkers.demo.talk import Exchange

NEAR_TIE: Final = 1e-3
"""Two logits closer than this may swap by rounding: kernels and chunking sum in other orders."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the plain model says of one reply."""

    request: int
    equal: bool
    near_ties: int
    """1 where the comparison ended at a near tie; what came before was equal."""
    detail: str = ""


class PlainModel:
    """The same weights in `transformers`, fp32, no cache of any kind."""

    def __init__(self, path: Path, *, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(threads)
        self._torch = torch
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        stops = self._model.generation_config.eos_token_id
        self._stops = set(stops) if isinstance(stops, list) else {stops}

    def prompt_tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the prompt as the chat template and tokeniser make it."""
        text = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def judge(self, exchange: Exchange) -> Verdict:
        """Say whether the reply is the plain model's own."""
        prompt = self.prompt_tokens(exchange.messages)
        answer = exchange.answer
        if len(prompt) != answer.prompt_tokens:
            words = f"the prompt has {len(prompt)} tokens, not {answer.prompt_tokens}"
            return Verdict(exchange.request, False, 0, words)
        reply = list(answer.tokens)
        logits = self._logits(prompt + reply, rows=len(reply) + 1)
        for place, row in enumerate(logits):
            top = row.topk(2)
            choice = int(top.indices[0])
            if place == len(reply):
                right = self._ends_rightly(answer.finish_reason, reply, choice)
            else:
                right = choice == reply[place]
            if right:
                continue
            if float(top.values[0] - top.values[1]) < NEAR_TIE:
                return Verdict(exchange.request, True, 1, f"near tie at token {place}")
            return Verdict(exchange.request, False, 0, f"differs at token {place}")
        return Verdict(exchange.request, True, 0)

    def _ends_rightly(self, finish_reason: str, reply: Sequence[int], choice: int) -> bool:
        """Say whether the plain model would have stopped where the reply stops."""
        if finish_reason != "stop" or (reply and reply[-1] in self._stops):
            return True
        return choice in self._stops

    def _logits(self, tokens: Sequence[int], *, rows: int) -> Any:
        """Return the logits [rows, vocabulary] of the last `rows` places."""
        with self._torch.inference_mode():
            ids = self._torch.tensor([list(tokens)])
            return self._model(ids, use_cache=False, logits_to_keep=rows).logits[0]


def judge_all(
    model: PlainModel,
    exchanges: Sequence[Exchange],
    *,
    judged: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Judge every exchange, telling each verdict as it comes."""
    verdicts = []
    for exchange in exchanges:
        verdict = model.judge(exchange)
        verdicts.append(verdict)
        judged(verdict)
    return verdicts
