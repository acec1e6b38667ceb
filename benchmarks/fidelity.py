"""What a store's fidelity costs: error of real K and V, and perplexity of real text behind them.

    python benchmarks/fidelity.py [--windows 6]

SmolLM2-135M reads windows of this project's own pages (English prose and tables). Of each, the
first 1,024 tokens are computed, kept as each fidelity keeps them and given back; the next 512 are
then predicted with that prefix in the pages. Prints one JSON object per fidelity.
"""

import asyncio
import json
import math
from pathlib import Path

import click
import torch
from kvkernels import ops
from kvworkers.frontends.tokenizer import ChatTokenizer
from kvworkers.models import LoadedModel, StepInputs, load_model
from kvworkers.models.provision import ensure_model
from kvworkers.stream.forms import stored_layout
from torch import Tensor

from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import Fidelity

PREFIX, NEXT = 1_024, 512
PAGES = (PREFIX + NEXT) // BLOCK_TOKENS


def step(tokens: list[int], first: int, *, sample: bool) -> StepInputs:
    """Return a step of `tokens` from position `first` of one sequence in pages 0, 1, 2 …"""
    at = torch.arange(first, first + len(tokens))
    return StepInputs(
        tokens=torch.tensor(tokens),
        positions=at,
        slots=at.clone(),
        block_tables=torch.arange(PAGES, dtype=torch.int32)[None],
        context_lengths=torch.tensor([first + len(tokens)], dtype=torch.int32),
        query_starts=torch.tensor([0, len(tokens)], dtype=torch.int32),
        sample_rows=torch.arange(len(tokens)) if sample else torch.empty(0, dtype=torch.int64),
    )


def kept(model: LoadedModel, pool: Tensor, fidelity: Fidelity) -> Tensor:
    """Return a pool with the prefix's pages as they come back from a store of `fidelity`."""
    raw, stored = model.spec.layout, stored_layout(model.spec.layout, fidelity)
    count, back = PREFIX // BLOCK_TOKENS, pool.clone()
    arena = torch.zeros(count * stored.block_bytes, dtype=torch.uint8)
    offsets, pages = torch.arange(count) * stored.block_bytes, torch.arange(count)
    element = getattr(torch, model.spec.dtype)
    ops.store_layers(ops.plan_movement(arena, stored, offsets, pool, raw, pages, element=element))
    ops.load_layers(ops.plan_movement(arena, stored, offsets, back, raw, pages, element=element))
    return back


def surprise(model: LoadedModel, pool: Tensor, tokens: list[int], after: int) -> float:
    """Return the summed negative log-likelihood of `tokens[1:]` and `after`, in nats."""
    logits = model.forward(step(tokens, PREFIX, sample=True), model.page_view(pool.clone()))
    wanted = torch.tensor([*tokens[1:], after])
    return float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))


@click.command()
@click.option("--windows", default=6, show_default=True, help="Of 1,536 tokens each.")
def main(windows: int) -> None:
    """Measure and print."""
    path = ensure_model(None)
    model = load_model(path)
    pages = sorted(Path(__file__).parent.parent.glob("docs/*.md"))
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
    tokens = list(asyncio.run(ChatTokenizer(path).text(text)))
    nats = dict.fromkeys(Fidelity, 0.0)
    errors = {fidelity: [0.0, 0.0] for fidelity in Fidelity}
    for window in range(windows):
        start = window * len(tokens) // windows
        prefix = tokens[start : start + PREFIX]
        following = tokens[start + PREFIX : start + PREFIX + NEXT + 1]
        pool = model.new_pool(PAGES)
        model.forward(step(prefix, 0, sample=False), model.page_view(pool))
        exact = model.page_view(pool)[: PREFIX // BLOCK_TOKENS].float()
        for fidelity in Fidelity:
            back = kept(model, pool, fidelity)
            there = model.page_view(back)[: PREFIX // BLOCK_TOKENS].float()
            errors[fidelity][0] += float((there - exact).square().sum())
            errors[fidelity][1] += float(exact.square().sum())
            nats[fidelity] += surprise(model, back, following[:-1], following[-1])
    base = math.exp(nats[Fidelity.EXACT] / (windows * NEXT))
    for fidelity in Fidelity:
        perplexity = math.exp(nats[fidelity] / (windows * NEXT))
        wrong, whole = errors[fidelity]
        row = {
            "fidelity": fidelity,
            "relative_error": round(math.sqrt(wrong / whole), 5),
            "perplexity": round(perplexity, 4),
            "of_exact": round(perplexity / base, 5),
            "tokens": windows * NEXT,
        }
        click.echo(json.dumps(row))


if __name__ == "__main__":
    main()
