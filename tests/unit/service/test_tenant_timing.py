"""A tenant cannot tell another's block from nobody's, by the answer or by the work it costs.

Work is counted in calls and not in seconds: equal paths take equal time on any machine, and a
count does not depend on how busy this one is.
"""

import gc
import sys
from collections.abc import Callable
from typing import Any

from kvstore.core.names import derive_root
from kvstore.service.roots import keys_of
from tests.arena_fixture import SHAPE, names, small_store

OWNER, TENANT = (derive_root(bytes(32), bytes(32), domain) for domain in ("team-a", "team-b"))


def calls_of(work: Callable[[], Any]) -> tuple[list[str], Any]:
    """Return the functions that `work` calls, in order, and what it gives."""
    seen: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            seen.append(argument.__name__ if event == "c_call" else frame.f_code.co_qualname)

    before = sys.getprofile()
    gc.disable()  # it would run in one of two turns, and whoever listens to it be called
    sys.setprofile(note)
    try:
        result = work()
    finally:
        sys.setprofile(before)
        gc.enable()
    return seen, result


def test_anothers_blocks_cost_and_answer_what_nobodys_do() -> None:
    with small_store() as small:
        owner, _ = small.session(1)
        owned = small.table.roots.open(OWNER, SHAPE, domain="team-a")
        owner.roots[OWNER] = owned
        small.put(owner, owned, names(4), 0.0)
        tenant, _ = small.session(2)
        theirs = small.table.roots.open(TENANT, SHAPE, domain="team-b")
        tenant.roots[TENANT] = theirs

        def ask(seed: int) -> Any:
            packed = b"".join(names(4, seed=seed))
            found = small.store.acquire(
                tenant, theirs, packed, reserve=0, first_block=0, now_ms=1.0
            )
            outcomes = [
                small.store.outcome(theirs, key, name)
                for key, name in zip(keys_of(theirs, packed), names(4, seed=seed), strict=True)
            ]
            return found.slots, found.reason, found.reserve_reason, outcomes

        ask(8)  # the first call of a root fills caches, whoever asks
        anothers, nobodys = calls_of(lambda: ask(0)), calls_of(lambda: ask(9))
        assert anothers == nobodys
        assert len(anothers[0]) > 10
        own, _ = calls_of(
            lambda: small.store.acquire(
                owner, owned, b"".join(names(4)), reserve=0, first_block=0, now_ms=1.0
            )
        )
        assert own != anothers[0], "a hit does look different, or this test could not see one"
