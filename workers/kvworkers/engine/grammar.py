"""Replies that follow a grammar: compiled once per text, and one position in it per request.

llguidance says which tokens may come next; how one of them is chosen is the sampler's own affair.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from kvstore.core.errors import BadInput, TooLarge, Unsupported
from kvstore.core.limits import MAX_GRAMMAR_BYTES
from kvworkers.few_threads import FewThreads

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT: Final = 64
"""Compiled grammars that are remembered: most requests of an application share one."""
COMPILERS: Final = 2
"""Grammars compiled at once; each takes milliseconds, the library's own bounds see to that."""
STEP_FUEL: Final = 200_000
"""For the lexer, each token: 14 ms by the library's account. Beyond it the reply fails."""
STEP_ITEMS: Final = 50_000
"""For the parser, each token: 3 ms likewise."""
COMPILE_SECONDS: Final = 30.0
"""For the wait behind others and for the first one's tokenizer; or for going through a reply."""


class Following:
    """Where one reply stands in its grammar. Used by one thread at a time."""

    def __init__(self, matcher: "LLMatcher", ends: Sequence[int]) -> None:
        """`ends` are the tokens that end a reply."""
        self._matcher = matcher
        self._ends = torch.tensor(list(ends))
        self.error = ""
        """Why it could not be followed to its end: the reply ended there, and is not whole."""

    def allow(self, logits: Tensor) -> Tensor:
        """Return the logits with minus infinity for every token that must not come next."""
        allowed = torch.zeros(logits.numel(), dtype=torch.bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if not self._matcher.is_error():
            known = np.unpackbits(bits, bitorder="little")[: logits.numel()]
            allowed[: len(known)] = torch.from_numpy(known.view(np.bool_))
        if not allowed.any():
            self.error = self.error or self._matcher.get_error() or "no token may come next"
            allowed[self._ends] = True
        return torch.where(allowed, logits, -torch.inf)

    def take(self, token: int) -> None:
        """Go on behind this token; after an end nothing follows."""
        self._matcher.consume_token(token)


class Grammars:
    """Compiles grammars for one model. One event loop's."""

    def __init__(self, model: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`model` is a directory with a tokenizer, which is read when first needed."""
        self._model = model
        self._vocab_size = vocab_size
        self._ends = tuple(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._threads = FewThreads("compiling of grammars", COMPILERS)

    async def follow(self, text: str, said: Sequence[int]) -> Following:
        """Return the place behind the tokens `said` in a grammar.

        Raises `BadInput` for what is no grammar or was left by `said`, `TooLarge`, and
        `Unsupported` where this model has no tokenizer that can be used, `Refused` when too many
        others are compiled.
        """
        if len(text) > MAX_GRAMMAR_BYTES:
            raise TooLarge(f"a grammar of {len(text)} characters; {MAX_GRAMMAR_BYTES} allowed")
        compiled = self._compiled.get(text)
        if compiled is None:
            # Off the loop: other requests' tokens go on meanwhile.
            compiled = await self._threads.run(
                lambda: self._compile(text), within_s=COMPILE_SECONDS
            )
            self._compiled[text] = compiled
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(text)
        matcher = compiled.deep_copy()
        # Half a microsecond a token, and a reply that goes on here may have many thousands.
        if said and not await self._threads.run(
            lambda: matcher.consume_tokens(list(said)), within_s=COMPILE_SECONDS
        ):
            raise BadInput("grammar: the reply so far does not follow it")
        return Following(matcher, self._ends)

    def _compile(self, text: str) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        if self._tokenizer is None:
            self._tokenizer = self._read_tokenizer()
        limits = LLParserLimits(
            step_lexer_fuel=STEP_FUEL,
            step_max_items=STEP_ITEMS,
            verbose_errors=False,  # they would repeat the text to whoever reads
        )
        grammar = LLMatcher.grammar_from_lark(text)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise BadInput(f"grammar: {matcher.get_error()}")
        return matcher

    def _read_tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer
        from transformers import AutoTokenizer

        if not self._ends:
            raise Unsupported(
                "this model has no token that ends a reply: none can follow a grammar"
            )
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(self._model), local_files_only=True)
            written = tokenizer.backend_tokenizer.to_str()
            return LLTokenizer(written, n_vocab=self._vocab_size, eos_token=list(self._ends))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise Unsupported(f"this model has no tokenizer for grammars: {error}") from error
