"""A real Llama of a few thousand weights, for tests of the engine that need no knowledge."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 199
EOS = 2
MAX_TOKENS = 512


@functools.cache
def tiny_model() -> Path:
    """Return a Hugging Face directory, made once per process."""
    directory = Path(tempfile.mkdtemp(prefix="kvstore-tiny-"))
    return save_llama(directory, vocab=VOCAB, max_tokens=MAX_TOKENS, bos=1, eos=EOS)


def save_llama(directory: Path, *, vocab: int, max_tokens: int, bos: int, eos: int) -> Path:
    """Write a Llama with random weights, the same ones each time, into `directory`; return it."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=max_tokens,
        bos_token_id=bos,
        eos_token_id=eos,
        initializer_range=0.7,
    )
    torch.manual_seed(7)
    LlamaForCausalLM(config).float().save_pretrained(directory)
    return directory


@functools.cache
def _reference() -> Any:
    return LlamaForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)


def reference_reply(prompt: list[int], max_tokens: int) -> list[int]:
    """Return what the plain model says, greedy, the end of sequence left out."""
    with torch.inference_mode():
        out = _reference().generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=EOS,
        )
    reply: list[int] = out[0, len(prompt) :].tolist()
    return reply[: reply.index(EOS)] if EOS in reply else reply
