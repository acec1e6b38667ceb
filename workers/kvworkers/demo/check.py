"""Holds every reply against the plain model of `transformers`, which has no cache at all.

One forward pass over prompt and reply gives the plain model's choice at every place of the
reply. The reply is the plain model's own greedy reply exactly when each choice is the token that
stands there: the first choice follows from the prompt alone, the second from the prompt and
that same first token, and so on. It costs one pass instead of one per token; and where a later
turn of the conversation begins with an earlier one, token by token, one pass judges both.
"""

from collections.abc import Callable, Mapping, Sequence
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
        from transformers.utils import logging

        logging.disable_progress_bar()  # it would break into ours
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

    def tokens(self, exchange: Exchange) -> list[int]:
        """Return prompt and reply of one exchange."""
        return self.prompt_tokens(exchange.messages) + list(exchange.answer.tokens)

    def judge(self, longest: Sequence[int], exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Judge exchanges whose tokens all stand at the beginning of `longest`, in one pass."""
        places: list[int] = []
        for exchange in exchanges:
            # The choice for place p is made from what stands before it: row p - 1.
            first = exchange.answer.prompt_tokens - 1
            places += range(first, first + len(exchange.answer.tokens) + 1)
        rows = iter(self._logits(longest, places))
        return [
            self._verdict(exchange, [next(rows) for _ in range(len(exchange.answer.tokens) + 1)])
            for exchange in exchanges
        ]

    def _verdict(self, exchange: Exchange, rows: Sequence[Any]) -> Verdict:
        """Compare one reply with the plain model's choices up to their first difference."""
        reply = exchange.answer.tokens
        for place, row in enumerate(rows):
            top = row.topk(2)
            choice = int(top.indices[0])
            if place == len(reply):
                right = self._ends_rightly(exchange.answer.finish_reason, reply, choice)
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

    def _logits(self, tokens: Sequence[int], places: Sequence[int]) -> Any:
        """Return the logits [len(places), vocabulary] that follow the tokens at `places`."""
        with self._torch.inference_mode():
            ids = self._torch.tensor([list(tokens)])
            keep = self._torch.tensor(list(places))
            return self._model(ids, use_cache=False, logits_to_keep=keep).logits[0]


def passes(sequences: Mapping[int, Sequence[int]]) -> list[tuple[Sequence[int], list[int]]]:
    """Group sequences under the longest ones that begin with them; a pass over each is enough.

    Returns (sequence, keys of all that it begins with), longest first.
    """
    groups: list[tuple[Sequence[int], list[int]]] = []
    for key, tokens in sorted(sequences.items(), key=lambda item: (-len(item[1]), item[0])):
        for longest, keys in groups:
            if longest[: len(tokens)] == tokens:
                keys.append(key)
                break
        else:
            groups.append((tokens, [key]))
    return groups


def judge_all(
    model: PlainModel,
    exchanges: Sequence[Exchange],
    *,
    judged: Callable[[int], None] = lambda count: None,
) -> list[Verdict]:
    """Judge every exchange, telling how many more are done after each pass."""
    verdicts: list[Verdict] = []
    numbered = {exchange.request: exchange for exchange in exchanges}
    sequences: dict[int, Sequence[int]] = {}
    for number, exchange in numbered.items():
        prompt = len(model.prompt_tokens(exchange.messages))
        if prompt != exchange.answer.prompt_tokens:
            words = f"the prompt has {prompt} tokens, not {exchange.answer.prompt_tokens}"
            verdicts.append(Verdict(number, False, 0, words))
        else:
            sequences[number] = model.tokens(exchange)
    judged(len(verdicts))
    for longest, keys in passes(sequences):
        verdicts += model.judge(longest, [numbered[key] for key in keys])
        judged(len(keys))
    return sorted(verdicts, key=lambda verdict: verdict.request)
