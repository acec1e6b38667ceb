"""Our router inside a real Ray Serve deployment of three replicas.

Needs Ray with its `serve` extra: this environment's, or KVSTORE_SERVE_PYTHON (`make test-engines`
builds one); skipped without.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from kvworkers.cluster.ray_runtime import environment

from tests.processes import REPOSITORY

_HERE = find_spec("grpc_reflection") is not None and find_spec("mmh3") is not None
PYTHON = os.environ.get("KVSTORE_SERVE_PYTHON", "") or (sys.executable if _HERE else "")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not PYTHON, reason="no Ray Serve: set KVSTORE_SERVE_PYTHON"),
    pytest.mark.timeout(240),
]


def served(*arguments: str) -> Any:
    """Run the deployment and return what it found."""
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as folder:  # sockets' names are long
        paths = [str(REPOSITORY / part) for part in ("", "workers", "kernels")]
        ours = environment(Path(folder)) | {"PYTHONPATH": os.pathsep.join(paths)}
        found = Path(folder) / "found.json"
        command = [PYTHON, "-m", "tests.engines.serve_process", "--temporary", f"{folder}/ray"]
        subprocess.run(
            [*command, "--found", str(found), *arguments], env=os.environ | ours, cwd=REPOSITORY,
            timeout=220, check=True,
        )  # fmt: skip
        return json.loads(found.read_text())


def test_conversations_stay_where_they_began_and_spread_over_replicas() -> None:
    """Six at once over three replicas: a turn may leave a queue, most go where the last one was."""
    found = served()
    conversations = found["turns"]
    assert {len(answers) for answers in conversations} == {4}
    stays = [one == after for answers in conversations for one, after in pairwise(answers)]
    assert sum(stays) >= 14, conversations  # of 18; at random 6
    assert len({one for answers in conversations for one in answers}) == 3
    _check_metrics(found["metrics"])


def _check_metrics(shown: dict[str, float]) -> None:
    """The router's own families stand on Ray's page, beside the count of choices."""
    names = {name.removesuffix("_total") for name in shown}
    wanted = {"serve_choices", "route_seconds_count", "route_seconds_bucket", "workers"}
    assert {f"ray_kvstore_{name}" for name in wanted} <= names, sorted(shown)
    counted = {name.removesuffix("_total"): value for name, value in shown.items()}
    assert counted["ray_kvstore_workers"] == 3
    assert 0 < counted["ray_kvstore_route_seconds_count"] <= 2 * 24


def test_prompts_go_to_the_replica_whose_engine_says_that_it_holds_them() -> None:
    found = served("--events")
    assert found["got"] == [found["holder"]] * 6
