"""A real, tiny Llama that reads and writes bytes: what HTTP needs of a model, in milliseconds.

Its weights are random, and so is what it says; what it must say is up to the request.
"""

import functools
import tempfile
from pathlib import Path

from tests.byte_tokenizer import END, make_byte_tokenizer
from tests.tiny_model import save_llama

VOCAB = 272
"""More than the tokenizer has, as models do."""
MAX_TOKENS = 2048


@functools.cache
def text_model() -> Path:
    """Return a Hugging Face directory with weights and tokenizer, made once per process."""
    directory = make_byte_tokenizer(Path(tempfile.mkdtemp(prefix="kvstore-text-")))
    return save_llama(directory, vocab=VOCAB, max_tokens=MAX_TOKENS, bos=END, eos=END)
