"""From a prompt that was read to one that a router places, for frontends outside our own."""

import hashlib
from collections.abc import Collection
from typing import Final

from kvstore.adapters.prompts import Reading
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import BlockName, ExtraKey, Root, chain
from kvstore.router.placement import Prompt
from kvstore.router.router import Router

_TEXT_DOMAIN: Final = b"kvstore.text.v1"


def root_of(root: Root, reading: Reading, base_models: Collection[str]) -> Root:
    """Return what a prompt is named under.

    A model that is none of `base_models` is an adapter, named as vLLM's events are
    (`router.vllm_events`); no name at all is the model, and with no base models said every name is.
    Text that nobody tokenised is a world of its own: no engine publishes such names.
    """
    if not reading.exact:
        root = Root(hashlib.sha256(_TEXT_DOMAIN + root + reading.model.encode()).digest())
    elif base_models and reading.model and reading.model not in base_models:
        root = Root(hashlib.sha256(root + reading.model.encode()).digest())
    return root


def prompt_to_place(
    router: Router,
    root: Root,
    reading: Reading | None,
    *,
    among: Collection[str] | None = None,
    exclude: Collection[str] = (),
    domain: str = "",
    ttft_slo_ms: float = 0.0,
) -> Prompt:
    """Return what the router is asked; a request without a prompt is placed by load alone."""
    if reading is None:
        names, tokens = list[BlockName](), 1
    elif reading.salt and reading.count >= BLOCK_TOKENS:
        salt = [ExtraKey(0, reading.salt.encode())]
        names, tokens = chain(root, reading.tokens, extra_keys=salt), reading.count
    else:
        names, tokens = router.names(root, reading.tokens), reading.count
    return Prompt(
        root, names, tokens, exclude=exclude, among=among, domain=domain, ttft_slo_ms=ttft_slo_ms
    )
