"""SGLang's modules without its GPU packages: what its caches do not use stands in for itself.

SGLang reads images with torchvision, which does not import beside a CPU build of torch.
"""

import importlib
import sys
import types
from typing import Any

import pytest

_IMAGES = (
    "torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.functional",
    "torchvision.transforms.v2", "torchvision.transforms.v2.functional",
)  # fmt: skip


class _Images(types.ModuleType):
    """A module whose every name is a class of nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        vars(self)["__path__"] = list[str]()  # a package: it has modules below it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def sglang(name: str) -> Any:
    """Import `sglang.{name}`; skip the module that asks where SGLang is not on the path."""
    pytest.importorskip("sglang.srt.environ")
    # Before the stand-ins: transformers looks whether there is a torchvision, and there is none.
    transformers = importlib.import_module("transformers")
    assert transformers.AutoProcessor and transformers.AutoImageProcessor
    for images in _IMAGES:
        sys.modules.setdefault(images, _Images(images))
    return importlib.import_module(f"sglang.{name}")
