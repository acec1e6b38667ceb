"""A cluster's configuration travels to its session as one line and is refused when wrong."""

from dataclasses import replace
from pathlib import Path

import pytest
from kvworkers.cluster.config import ClusterConfig

from kvstore.cli.values import Address
from kvstore.core.errors import BadInput

CONFIG = ClusterConfig(model=Path("m"), run_dir=Path("r"), workers=3, http=Address("127.0.0.1", 1))


def test_it_survives_the_way_to_the_session() -> None:
    assert ClusterConfig.from_json(CONFIG.to_json()) == CONFIG


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("workers", 0, "--workers"),
        ("workers", 1025, "--workers"),
        ("arena_bytes", 1, "--arena"),
        ("pool_bytes", -1, "--pool"),
        ("threads", -1, "--threads"),
        ("tensor_parallel", 0, "--tensor-parallel"),
        ("tensor_parallel", 65, "--tensor-parallel"),
        ("prefill", -1, "--prefill"),
        ("prefill", 3, "--prefill 3: must lie in 0..2"),
        ("prefill", 2, "--prefill 2: none of the workers would answer"),
        ("decode", 3, "--decode 3: must lie in 0..2"),
    ],
)
def test_a_wrong_value_names_its_flag(field: str, value: int, flag: str) -> None:
    with pytest.raises(BadInput, match=flag):
        ClusterConfig(model=Path("m"), run_dir=Path("r"), **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 1}'])
def test_what_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        ClusterConfig.from_json(text)


def test_workers_share_the_cores() -> None:
    assert CONFIG.threads_per_worker(cores=16) == 5
    assert CONFIG.threads_per_worker(cores=2) == 1
    ranks = replace(CONFIG, tensor_parallel=2)
    assert ranks.ranks() == 2 * CONFIG.workers
    assert ranks.threads_per_worker(cores=4 * CONFIG.workers) == 2


def test_roles_go_by_number_and_whoever_is_left_can_answer() -> None:
    config = replace(CONFIG, workers=4, prefill=1, decode=2)
    roles = [config.role_of(f"worker-{number}") for number in range(6)]
    # Those that `kvstore scale` adds have none; what it leaves of these begins with the first.
    assert roles == ["decode", "decode", "both", "prefill", "both", "both"]
    with pytest.raises(BadInput, match="--prefill 2: with 3 to decode more than the 4 workers"):
        replace(config, prefill=2, decode=3)
    assert {CONFIG.role_of(f"worker-{number}") for number in range(3)} == {"both"}
