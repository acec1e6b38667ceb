"""Replies under a constraint, in a batch with free ones; steps in turn and begun ahead."""

import asyncio
from typing import Any

import torch
from kvworkers.models.loading import LoadedModel

from tests.tiny_model import reference_reply
from tests.unit.workers.test_engine import ahead as ahead
from tests.unit.workers.test_engine import ask, prompt_of, rig, run
from tests.unit.workers.test_engine import loaded as loaded


class Even:
    """Lets only tokens of even number come, and notes what came."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allow(self, logits: torch.Tensor) -> torch.Tensor:
        odd = torch.arange(len(logits)) % 2 == 1
        return logits.masked_fill(odd, -torch.inf)

    def take(self, token: int) -> None:
        self.taken.append(token)


async def test_a_constraint_sees_every_token_and_holds_up_nobody_else(loaded: LoadedModel) -> None:
    prompt = prompt_of(11, 20)
    async with rig(loaded) as it:
        ways: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}, {"min_p": 0.1}]
        for how in [*ways, {"frequency_penalty": 2.0}]:
            rule = Even()
            request = ask(prompt, max_tokens=12, ignore_eos=True, constraint=rule, **how)
            held, free = await asyncio.gather(
                run(it.engine, request), run(it.engine, ask(prompt, max_tokens=12))
            )
            assert held.tokens == rule.taken and len(held.tokens) == 12
            assert all(token % 2 == 0 for token in held.tokens)
            assert free.tokens == reference_reply(prompt, 12)
