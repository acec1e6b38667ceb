"""Limits fit each other: what one allows, the next must be able to carry."""

from kvstore.core import limits
from kvstore.core.layout import BlockLayout, Codec


def test_the_largest_batch_of_names_fits_a_message() -> None:
    names = limits.MAX_NAMES_PER_CALL * limits.NAME_BYTES
    # Beside the names an Acquire's reply has at most four numbers per name, ten bytes each.
    assert names * 2 < limits.MAX_MESSAGE_BYTES
    assert limits.MAX_NAMES_PER_CALL * 40 < limits.MAX_MESSAGE_BYTES


def test_the_largest_prompt_fits_a_message_and_a_call() -> None:
    assert limits.MAX_PROMPT_TOKENS * 4 < limits.MAX_MESSAGE_BYTES
    assert limits.MAX_PROMPT_TOKENS // limits.BLOCK_TOKENS <= limits.MAX_NAMES_PER_CALL


def test_llama_405b_fits_a_block() -> None:
    layout = BlockLayout(layers=126, kv_heads=8, head_dim=128, codec=Codec.RAW16)
    assert layout.block_bytes <= limits.MAX_BLOCK_BYTES


def test_silence_is_suspect_only_after_several_marks() -> None:
    assert limits.SUSPECT_AFTER_MS >= 3 * limits.MARK_PERIOD_MS
