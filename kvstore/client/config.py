"""How long a client waits, and for what. Every call has a deadline; these are the defaults."""

from dataclasses import dataclass, fields

from kvstore.core.errors import BadInput
from kvstore.core.limits import MAX_DEADLINE_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Deadlines in milliseconds. A cache that is slower than this is treated as absent."""

    call_ms: int = 250
    """`acquire`, `settle`, `lookup`, `stats`: answered from memory, so 250 ms means trouble."""
    connect_ms: int = 2_000
    """Handshake, mapping and opening the root, at first and after a keeper's restart."""
    transfer_ms: int = 2_000
    """`get`, `put` and `wait_ready`: a whole batch of copies or of loads from below."""
    rejoin_first_ms: int = 100
    """First pause before a new session is tried after the keeper's death; doubles …"""
    rejoin_most_ms: int = 2_000
    """… up to this."""
    sweep_ms: int = 2_000
    """Pause between two looks for slots that were reserved by a call whose answer was lost."""

    def __post_init__(self) -> None:
        for field in fields(self):
            check_deadline(field.name, getattr(self, field.name))


def check_deadline(name: str, value: int) -> int:
    """Return `value` when it is a sound number of milliseconds; raises `BadInput` naming it."""
    if not 0 < value <= MAX_DEADLINE_MS:
        raise BadInput(f"{name} is {value} ms; 1 to {MAX_DEADLINE_MS} allowed")
    return value
