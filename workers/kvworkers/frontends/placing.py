"""What the router is asked for a request that runs: at first, after a failure, at a hand-over."""

from collections.abc import Collection, Sequence
from contextlib import suppress

from kvstore.core.errors import NotFound, Refused, Unreachable
from kvstore.core.names import BlockName, ExtraKey, chain
from kvstore.router.placement import Decision, Prompt
from kvstore.router.router import Router
from kvstore.router.split import Whole
from kvworkers.frontends.fleet import Fleet
from kvworkers.frontends.running import Running


class Placing:
    """Asks one router on behalf of one frontend's requests."""

    def __init__(
        self, router: Router, fleet: Fleet, *, share_domain: str, wait_ms: float,
        other_wait_ms: float,
    ) -> None:  # fmt: skip
        """`wait_ms` and `other_wait_ms` as `PipelineConfig` has them."""
        self._router = router
        self._fleet = fleet
        self._share_domain = share_domain
        self._wait_ms = wait_ms
        self._other_wait_ms = other_wait_ms

    async def place(self, running: Running, failed: set[str]) -> Decision:
        """Choose a worker; one that failed is asked again only when there is no other."""
        with suppress(NotFound, Unreachable):  # workers may have come since; none is as good as old
            running.offer = self._fleet.offer(running.offer.model)
        packed = (running.prompt + running.output).tobytes()
        names, tokens = self._names(running, packed), len(packed) // 4
        whole = _whole(running)
        domain = running.request.share_domain or self._share_domain

        def prompt(exclude: Sequence[str], among: Collection[str]) -> Prompt:
            return Prompt(
                running.offer.root, names, tokens, frozenset(exclude), among,
                not running.request.no_store, domain=domain, priority=running.request.priority,
                whole=whole,
            )  # fmt: skip

        everyone, left_ms = running.offer.workers, running.left_s * 1_000
        preferred = (running.prefer & everyone) - failed
        if not running.handed:
            running.prefer = frozenset()
        if preferred:
            with suppress(Refused):  # they are full, or gone: then whoever is best
                return await self._router.route(prompt((), preferred), wait_ms=0, deadline_ms=0)
        if failed:
            try:
                wait_ms = min(self._other_wait_ms, left_ms)
                return await self._router.route(prompt(sorted(failed), everyone), wait_ms=wait_ms)
            except Refused:
                failed.clear()
        alive_ms = min(self._wait_ms, left_ms)
        anyone = prompt((), everyone)
        return await self._router.route(anyone, wait_ms=alive_ms, deadline_ms=left_ms)

    def _names(self, running: Running, packed: bytes) -> list[BlockName]:
        """Name what is to be computed; what reads no cache hits nowhere, so it needs no names."""
        if running.request.no_read:
            return []
        if salt := running.request.cache_salt:
            return chain(running.offer.root, packed, extra_keys=[ExtraKey(0, salt)])
        return self._router.names(running.offer.root, packed)


def _whole(running: Running) -> Whole | None:
    """Return why one worker has to do all that is left; None: two may."""
    if running.max_tokens - len(running.output) <= 1:
        return Whole.FIRST_TOKEN
    if running.request.no_store:
        return Whole.NO_STORE
    if running.request.no_read:
        return Whole.NO_READ
    return Whole.HAND_OVER if running.handed else None
