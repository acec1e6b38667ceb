"""What `kvstore demo` prints: the JSON that programs rely on, and tables that people read."""

import json

from kvworkers.demo.check import Verdict
from kvworkers.demo.report import Outcome, live_line, print_tables, row, summary
from kvworkers.demo.talk import Answer, Exchange, Pair
from rich.console import Console


def exchange(request: int, *, hbm: int = 0, dram: int = 0, worker: str = "worker-0") -> Exchange:
    answer = Answer(
        text="Lyon [the town]",
        tokens=(1, 2, 3),
        finish_reason="length",
        prompt_tokens=100,
        cached={"hbm": hbm, "dram": dram, "nvme": 0, "peer": 0},
        ttft_ms=50.04,
        total_ms=250.04,
        worker=worker,
        places="",
        retries=0,
    )
    return Exchange(request=request, client=1, turn=0, messages=[], answer=answer)


def outcome(*, equal: bool) -> Outcome:
    return Outcome(
        exchanges=[exchange(0), exchange(1, hbm=64), exchange(2, dram=80, worker="worker-1")],
        pairs=[Pair(100, 80, 10.0, 300.0), Pair(90, 80, 20.0, 200.0), Pair(80, 80, 10.0, 100.0)],
        verdicts=[Verdict(0, True, 0), Verdict(1, True, 1), Verdict(2, equal, 0, "differs")],
        seconds=12.34,
    )


def test_a_row_has_exactly_the_fields_that_are_promised() -> None:
    assert row(exchange(1, hbm=64)) == {
        "request": 1,
        "client": 1,
        "turn": 0,
        "prompt_tokens": 100,
        "cached": {"hbm": 64, "dram": 0, "nvme": 0, "peer": 0},
        "ttft_ms": 50.0,
        "tokens": 3,
        "worker": "worker-0",
    }


def test_the_summary_is_right_and_is_json() -> None:
    told = summary(outcome(equal=True))
    assert json.loads(json.dumps(told)) == {
        "summary": {
            "requests": 3,
            "equal_to_uncached": 3,
            "hit_rate": {"hbm": 0.2133, "dram": 0.2667, "nvme": 0.0, "peer": 0.0},
            "ttft_cold_ms": 200.0,
            "ttft_hit_ms": 10.0,
            "seconds": 12.3,
        }
    }


def test_one_unequal_reply_fails_the_whole() -> None:
    assert outcome(equal=True).passed
    assert not outcome(equal=False).passed
    empty = Outcome(exchanges=[], pairs=[], verdicts=[], seconds=0.0)
    assert not empty.passed, "nothing asked proves nothing"


def test_people_see_the_same() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(live_line(exchange(1, hbm=64)))
    print_tables(console, outcome(equal=False))
    console.file.close()
    text = console.export_text()
    assert "Lyon [the town]" in text
    assert "Only 2 of 3 replies" in text
    assert "10.0x" in text
    assert "near tie" in text
    assert "NVMe" not in text, "nothing came from a disk"


def test_a_tier_that_gave_something_has_its_column() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    shown = outcome(equal=True)
    shown.exchanges[0].answer.cached["nvme"] = 16
    print_tables(console, shown)
    console.file.close()
    text = console.export_text()
    assert "NVMe (the host's disk)" in text
    heads = next(line.split() for line in text.splitlines() if "computed" in line)
    assert heads[3:7] == ["HBM", "DRAM", "NVMe", "computed"]


def test_the_rate_counts_what_came_after_the_first_token() -> None:
    assert exchange(0).answer.tokens_per_second == 10.0
