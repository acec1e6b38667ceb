"""The clock round a policy changes nothing of it, and what it measures is a node that evicts."""

import json

import pytest
from click.testing import CliRunner

from kvstore.cli.bench_store import store
from kvstore.cli.bench_store_policy import CASES, ClockedPolicy, served
from kvstore.directory.lru import Lru
from kvstore.directory.policy import Policy
from kvstore.testing.policy_contract import PolicyContract


class TestClockedPolicy(PolicyContract):
    def make(self) -> Policy:
        return ClockedPolicy(Lru())


@pytest.mark.parametrize("name", ["ours", "lru"])
def test_a_full_arena_serves_and_evicts(name: str) -> None:
    policy = served(name, 150, slots=1_024)
    assert policy.inner.name == name
    assert len(policy) == 1_024
    assert policy.removed > 1_000
    assert policy.touched > 150 * 32
    assert 0 < policy.seconds < 60


def test_the_case_is_run_by_the_command() -> None:
    result = CliRunner().invoke(store, ["--case", "policy lru*", "--quick", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = map(json.loads, result.stdout.splitlines())
    assert (row["bench"], row["case"], row["unit"]) == ("store", CASES[1], "us")
    assert row["limit"] == 4.0
    assert row["ratio_to_limit"] == pytest.approx(4.0 / row["value"], rel=0.01)
