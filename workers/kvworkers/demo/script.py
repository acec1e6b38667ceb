"""Who asks what: conversations over documents of ours. Pure, so every run asks the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from kvstore.core.errors import BadInput

MAX_CLIENTS: Final = 32
MAX_TURNS: Final = 6
"""As many as there are questions about each document."""

QUESTIONS: Final[dict[str, tuple[str, ...]]] = {
    "lyon": (
        "What is a traboule?",
        "When was Lugdunum founded?",
        "What did the Lumière brothers film in 1895?",
        "Which hill is called the hill that works?",
        "How large is the square of Bellecour?",
        "How long does the fast train to Paris take?",
    ),
    "moka": (
        "How high may I fill the boiler?",
        "Why should I not press the coffee down?",
        "How often is the gasket replaced?",
        "May an aluminium pot go into the dishwasher?",
        "What does steam at the seam mean?",
        "Who presented the moka pot, and when?",
    ),
    "tides": (
        "Why is high water later each day?",
        "What is a neap tide?",
        "Where is the range of the tide about 16 metres?",
        "What is the rule of twelfths?",
        "How fast is the Saltstraumen?",
        "How much does a fall in air pressure lift the sea?",
    ),
}

_DOCUMENTS: Final = (0, 0, 1, 2)
"""Which document each of four clients has."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One client's part: a system prompt shared by all, a document shared by some, questions."""

    client: int
    system: str
    document: str
    questions: tuple[str, ...]

    def opening(self) -> list[dict[str, str]]:
        """Return the messages up to and with the first question."""
        first = f"{self.document}\n\nMy question about this document: {self.questions[0]}"
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": first},
        ]

    def after(
        self, messages: Sequence[dict[str, str]], reply: str, *, turn: int
    ) -> list[dict[str, str]]:
        """Return the messages with `reply` and the question of `turn` (from 0) added."""
        return [
            *messages,
            {"role": "assistant", "content": reply},
            {"role": "user", "content": self.questions[turn]},
        ]


def document(name: str) -> str:
    """Return one of our documents by name."""
    return (files("kvworkers.demo") / "documents" / f"{name}.md").read_text("utf-8").strip()


def conversations(clients: int, turns: int) -> list[Conversation]:
    """Return one conversation per client.

    Of each four clients two share a document, and the others share only the system prompt: their
    documents are worth a worker of their own, which takes the shared part out of the arena.
    Questions start at another place for each client, so that two conversations about one
    document part after it.
    """
    if not 1 <= clients <= MAX_CLIENTS:
        raise BadInput(f"--clients {clients}: must lie in 1..{MAX_CLIENTS}")
    if not 1 <= turns <= MAX_TURNS:
        raise BadInput(f"--turns {turns}: must lie in 1..{MAX_TURNS}")
    system = document("handbook")
    names = sorted(QUESTIONS)
    parts = []
    for client in range(clients):
        name = names[_DOCUMENTS[client % len(_DOCUMENTS)]]
        asked = QUESTIONS[name]
        start = client * turns % len(asked)
        questions = tuple(asked[(start + turn) % len(asked)] for turn in range(turns))
        parts.append(Conversation(client, system, document(name), questions))
    return parts
