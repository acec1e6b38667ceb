"""The committed samples of traces are what their README says."""

import gzip
import json
import re
from pathlib import Path

import pytest

TRACES = Path(__file__).resolve().parents[1] / "data" / "traces"
ROWS = re.findall(
    r"^\| (\w+\.jsonl\.gz) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|",
    (TRACES / "README.md").read_text(encoding="utf-8"),
    flags=re.M,
)


def test_the_table_lists_every_file_and_all_are_small() -> None:
    files = sorted(TRACES.glob("*.gz"))
    assert [path.name for path in files] == sorted(row[0] for row in ROWS)
    assert sum(path.stat().st_size for path in files) < 1 << 20


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_sample_is_whole_and_in_order(row: tuple[str, ...]) -> None:
    block_tokens = int(row[1])
    with gzip.open(TRACES / row[0], "rt", encoding="utf-8") as file:
        requests = [json.loads(line) for line in file]
    refs = [block for request in requests for block in request["hash_ids"]]
    counted = [len(requests), len(set(refs)), len(refs)]
    assert counted == [int(number.replace(",", "")) for number in row[2:5]]
    times = [request["timestamp_ms"] for request in requests]
    assert times == sorted(times)
    for request in requests:
        last = request["input_length"] - block_tokens * (len(request["hash_ids"]) - 1)
        assert 0 < last <= block_tokens
