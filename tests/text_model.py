"""A real, tiny Llama that reads and writes bytes: what HTTP needs of a model, in milliseconds.

Its weights are random, and so is what it says; what it must say is up to the request.
"""

import functools
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.byte_tokenizer import END, make_byte_tokenizer

VOCAB = 272
"""More than the tokenizer has, as models do."""
MAX_TOKENS = 2048


@functools.cache
def text_model() -> Path:
    """Return a Hugging Face directory with weights and tokenizer, made once per process."""
    directory = make_byte_tokenizer(Path(tempfile.mkdtemp(prefix="kvstore-text-")))
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=END,
        eos_token_id=END,
        initializer_range=0.7,
    )
    torch.manual_seed(7)
    LlamaForCausalLM(config).float().save_pretrained(directory)
    return directory
