"""The rule of exactness: greedy replies equal `transformers.generate`'s, token by token.

Two ways to compute the same logits differ in rounding (chunking, order of sums), so where the
reference's two best logits are closer than `NEAR_TIE` either may win. Replies are compared up to
the first difference; if it is such a near tie it is counted, printed, and the comparison of this
reply stops there; else it is an error.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

NEAR_TIE: Final = 1e-3


class Reference:
    """The plain model out of `transformers`, float32, without any cache of ours."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.model.eval()
        self._replies: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        ends = self.model.generation_config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])

    def reply(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Return the greedy reply, the end of sequence left out; each is computed once."""
        key = (tuple(prompt), max_tokens)
        if key not in self._replies:
            self._replies[key] = self._generate(prompt, max_tokens)
        return self._replies[key]

    def _generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        with torch.inference_mode():
            out = self.model.generate(
                torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=min(self.ends),
            )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        end = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        return tokens[:end]

    def gap(self, tokens: Sequence[int]) -> float:
        """Return the distance of the two best logits after `tokens`."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([list(tokens)]), logits_to_keep=1).logits[0, -1]
        first, second = torch.topk(logits.float(), 2).values.tolist()
        return float(first - second)

    def chat(self, *messages: tuple[str, str]) -> list[int]:
        """Return a conversation's tokens as the model's chat template renders them."""
        turns = [{"role": role, "content": content} for role, content in messages]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens


@dataclass
class Exactness:
    """Compares replies with a reference and counts."""

    reference: Reference
    replies: int = 0
    equal: int = 0
    near_ties: list[str] = field(default_factory=list)

    def check(
        self, what: str, prompt: Sequence[int], expected: Sequence[int], actual: Sequence[int]
    ) -> None:
        """Raise `AssertionError` where `actual` differs by more than a near tie."""
        self.replies += 1
        if list(actual) == list(expected):
            self.equal += 1
            return
        pairs = zip(actual, expected, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        # One of the two ended where the other went on: that is the difference.
        at = same if same is not None else min(len(actual), len(expected))
        gap = self.reference.gap([*prompt, *expected[:at]])
        note = f"{what}: differs at token {at}, top-2 gap {gap:.2e}"
        assert gap < NEAR_TIE, f"{note}\nexpected {list(expected)}\nactual   {list(actual)}"
        self.near_ties.append(note)
        sys.stderr.write(f"near tie: {note}\n")
