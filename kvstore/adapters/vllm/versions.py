"""Which vLLM this adapter was run against: its connector interface changes between minors."""

from typing import Final

from kvstore.core.errors import Unsupported

TESTED: Final = ("0.32",)
"""Minor releases that `make test-engines` has run."""


def check_engine(version: str) -> None:
    """Raise `Unsupported` naming `version` unless its minor release is one that we test."""
    minor = ".".join(version.split("+")[0].split(".")[:2])
    if minor not in TESTED:
        raise Unsupported(
            f"vLLM {version} is not served by this build of kvstore: it is tested with "
            f"{', '.join(TESTED)}; see docs/engines/vllm.md"
        )
