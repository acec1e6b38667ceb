"""One cluster and one reference model for all end-to-end tests of a session."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from tests.cluster_process import ClusterProcess, cluster_process
from tests.exactness import Exactness, Reference
from tests.model_fixture import model_dir

__all__ = ["model_dir"]

COUNTED: Final = pytest.StashKey[Exactness]()


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
def exactness(reference: Reference, pytestconfig: pytest.Config) -> Exactness:
    """Compares and counts; says in the run's summary what it saw, captured output or not."""
    counted = Exactness(reference)
    pytestconfig.stash[COUNTED] = counted
    return counted


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print how many replies were compared, how many were equal, and every near tie."""
    counted = config.stash.get(COUNTED, None)
    if counted is None:
        return
    terminalreporter.section("exactness")
    ties = counted.near_ties
    terminalreporter.line(
        f"{counted.replies} replies, {counted.equal} equal, {len(ties)} near ties"
    )
    for tie in ties:
        terminalreporter.line(f"near tie: {tie}")
