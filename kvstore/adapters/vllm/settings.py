"""What a user writes into `kv_connector_extra_config`, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvstore.client.config import check_deadline
from kvstore.core.errors import BadInput, Unsupported


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The connector's options; times in milliseconds."""

    run_dir: str
    """Run directory of the host's cache node, as given to `kvstore node --run-dir`."""
    share_domain: str = ""
    """Who may share blocks with this engine."""
    weights_digest: str = ""
    """SHA-256 of the weights; computed from the model's directory when empty."""
    call_ms: int = 250
    """One call to the node; what a hanging node costs a request once."""
    load_ms: int = 2_000
    """How long blocks below DRAM may take to come up before the request recomputes."""
    circuit_ms: int = 1_000
    """How long the node is left alone after a call failed."""
    min_load_tokens: int = 1
    """Hits that would save fewer tokens than this are recomputed."""
    max_store_jobs: int = 64
    """Stores that wait in the background; each holds its blocks. More are dropped, counted."""
    store_output: bool = True
    """Whether generated tokens are stored too: the next turn of a conversation begins with them."""
    layerwise: bool = False
    """Load in the step that computes, a layer ahead of it, instead of whole requests before it."""

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise BadInput("kv_connector_extra_config has no run_dir: where is the cache node?")
        for name in ("call_ms", "load_ms", "circuit_ms"):
            check_deadline(name, getattr(self, name))
        for name in ("min_load_tokens", "max_store_jobs"):
            if getattr(self, name) <= 0:
                raise BadInput(f"{name} must be positive, got {getattr(self, name)}")


def read_settings(extra: Mapping[str, Any]) -> Settings:
    """Return checked settings; raises `BadInput` naming an unknown or mistyped option."""
    kinds = {field.name: field.type for field in fields(Settings)}
    for name, value in extra.items():
        if name not in kinds:
            raise BadInput(f"kv_connector_extra_config: unknown option {name!r}")
        if type(value) is not kinds[name]:
            raise BadInput(f"kv_connector_extra_config: {name} is {value!r}, not {kinds[name]}")
    return Settings(**{"run_dir": "", **extra})


def check_schedule(settings: Settings, *, ahead: bool) -> None:
    """Raise `Unsupported` where vLLM plans a step ahead of the last one's results, by layers.

    That step would compute over a load that failed, and vLLM would take its token.
    """
    if settings.layerwise and ahead:
        raise Unsupported("layerwise with asynchronous scheduling: set --no-async-scheduling")
