"""What a request cost and where its prompt came from, as its reply says it. Pure."""

from collections.abc import Sequence
from typing import Any

from kvworkers.frontends.generation import Chunk


class Usage:
    """Adds up one request's replies: `choices` to each of its prompts, numbered in that order.

    A prompt counts once however many replies it has, with what the reply found cached that found
    least: what others found may be what that one computed.
    """

    def __init__(self, prompts: Sequence[int], choices: int) -> None:
        """`prompts` are their lengths in tokens."""
        self._prompt_tokens = sum(prompts)
        self._choices = choices
        self._cached: dict[int, int] = {}
        self._output: dict[int, int] = {}

    def note(self, number: int, chunk: Chunk) -> None:
        """Take in one reply's next chunk."""
        self._output[number] = chunk.output_tokens
        if chunk.cache is not None:
            prompt, found = number // self._choices, chunk.cache.cached_tokens
            self._cached[prompt] = min(found, self._cached.get(prompt, found))

    def as_json(self) -> dict[str, Any]:
        """Return OpenAI's `usage` of what came so far."""
        output = sum(self._output.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": output,
            "total_tokens": self._prompt_tokens + output,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


def extension(chunk: Chunk) -> dict[str, Any]:
    """Return what we say beyond OpenAI's fields, from the last chunk of a reply."""
    cache = chunk.cache
    return {
        "cached_tokens": (
            {tier.name.lower(): tokens for tier, tokens in cache.by_tier.items()} if cache else {}
        ),
        "computed_tokens": cache.computed_tokens if cache else 0,
        "miss_reason": cache.miss_reason.name.lower() if cache else "",
        "places": cache.places if cache else "",
        "ttft_ms": round(chunk.ttft_ms, 3),
        "worker": chunk.worker,
        "prefill_worker": chunk.prefill_worker,
        "retries": chunk.retries,
    }


def by_choice(chunks: Sequence[tuple[int, Chunk]]) -> list[list[Chunk]]:
    """Return each choice's chunks, in the order of the choices."""
    found: dict[int, list[Chunk]] = {}
    for number, chunk in chunks:
        found.setdefault(number, []).append(chunk)
    return [found[number] for number in sorted(found)]
