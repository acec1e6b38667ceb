"""docs/life_of_a_block.md and the code's table of slot states say the same."""

import re
from pathlib import Path

from kvstore.core.slots import TRANSITIONS, SlotState

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "life_of_a_block.md"


def test_the_diagram_is_the_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    arrows = set(re.findall(r"^    (\w+) --> (\w+)(?::|$)", text, re.MULTILINE))
    table = {(a.name, b.name) for a, following in TRANSITIONS.items() for b in following}
    assert arrows == table


def test_every_state_is_explained() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert set(re.findall(r"^\*\*([A-Z]+)\.\*\*", text, re.MULTILINE)) == set(SlotState.__members__)
