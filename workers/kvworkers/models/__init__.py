"""Models: from a directory to logits over paged K and V.

Knows: transformers, `kvkernels.ops`, files. Must not know: requests, scheduling, the store's
processes. `provision` makes a directory, `digest` identifies it, `spec` reads what it is,
`loading` runs it, `attention` is what transformers calls in every layer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvworkers.models.loading import LoadedModel, load_model
    from kvworkers.models.spec import ModelSpec, read_spec
    from kvworkers.models.step import StepInputs

__all__ = ["LoadedModel", "ModelSpec", "StepInputs", "load_model", "read_spec"]

_HOMES = {
    "LoadedModel": "loading",
    "ModelSpec": "spec",
    "StepInputs": "step",
    "load_model": "loading",
    "read_spec": "spec",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: preparing a model must not wait for torch."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
