"""Models: from a directory to logits over paged K and V.

Knows: transformers, `kvkernels.ops`, files. Must not know: requests, scheduling, the store's
processes. `provision` makes a directory, `digest` identifies it, `spec` reads what it is,
`loading` runs it, `attention` is what transformers calls in every layer.
"""

from kvworkers.models.loading import LoadedModel, load_model
from kvworkers.models.spec import ModelSpec, read_spec
from kvworkers.models.step import StepInputs

__all__ = ["LoadedModel", "ModelSpec", "StepInputs", "load_model", "read_spec"]
