"""Tensor parallelism: one model in several processes, each with some of its heads.

Knows: how rank 0 has the others compute, load and store what it does. Must not know: requests,
scheduling, sampling, the cache node: all that is rank 0's, and it is an ordinary worker.
"""

from typing import Final

MAX_RANKS: Final = 64
"""Of one worker: its session names the process of each."""
