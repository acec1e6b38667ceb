"""One cluster and one reference model for all end-to-end tests of a session."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cluster_process import ClusterProcess, cluster_process
from tests.exactness import Exactness, Reference
from tests.model_fixture import model_dir

__all__ = ["model_dir"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[ClusterProcess]:
    """The cluster that most tests share."""
    with cluster_process("--arena", "512MiB") as running:
        yield running


@pytest.fixture(scope="session")
def reference(model_dir: Path) -> Reference:
    """The plain model of `transformers`."""
    torch.set_num_threads(1)  # several threads on shared cores wait for each other
    return Reference(model_dir)


@pytest.fixture(scope="session")
def exactness(reference: Reference) -> Iterator[Exactness]:
    """Compares and counts; says at the end what it saw."""
    counted = Exactness(reference)
    yield counted
    said = f"{counted.replies} replies, {counted.equal} equal, {len(counted.near_ties)} near ties"
    sys.stderr.write(f"\n{said}\n")
