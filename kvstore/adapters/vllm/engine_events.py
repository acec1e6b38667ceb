"""Blocks that came into the node or went from it, as vLLM's own events."""

# vLLM lives in another environment than the tools that read this.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import Iterable
from typing import Any, Final

from vllm.distributed.kv_events import MEDIUM_CPU, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

from kvstore.adapters.vllm.block_events import BlockWord, Placed

OWNERSHIP: Final = "kvstore"
"""What tells these events from those of the engine's own cache, and of another tier."""


def engine_events(words: Iterable[BlockWord]) -> list[Any]:
    """Return one event for each block, in order."""
    return [_removed(word.block) if word.removed else _stored(word.block) for word in words]


def _stored(block: Placed) -> Any:
    return BlockStored(
        block_hashes=[_published(block.block_hash)],
        parent_block_hash=None if block.parent is None else _published(block.parent),
        token_ids=list(block.tokens),
        block_size=len(block.tokens),
        lora_id=None,
        medium=MEDIUM_CPU,
        lora_name=None,
        extra_keys=[(block.salt,)] if block.salt else None,
        locality="LOCAL",
        ownership=OWNERSHIP,
    )


def _removed(block: Placed) -> Any:
    return BlockRemoved(
        block_hashes=[_published(block.block_hash)],
        medium=MEDIUM_CPU,
        locality="LOCAL",
        ownership=OWNERSHIP,
    )


def _published(block_hash: bytes) -> Any:
    return maybe_convert_block_hash(BlockHash(block_hash))
