"""What the engine holds of requests and of steps that were begun."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.core.errors import KvStoreError
from kvworkers.engine.output import FirstTokens, OutputStream
from kvworkers.engine.sampling import Sampler
from kvworkers.engine.sequence import Sequence as Run
from kvworkers.engine.steps import Launched
from kvworkers.engine.work import Work


@dataclass(eq=False, slots=True)
class Active:
    """One request in the engine."""

    run: Run
    sampler: Sampler
    stream: OutputStream
    load_task: "asyncio.Task[None] | None" = None
    error: KvStoreError | None = None

    @property
    def over(self) -> bool:
        """Whether its caller has been told of an end."""
        return self.run.finish is not None or self.error is not None

    @property
    def ends_ms(self) -> float | None:
        """When its deadline passes; None where it has none."""
        deadline_ms = self.run.request.deadline_ms
        return self.run.arrived_ms + deadline_ms if deadline_ms else None

    def first_tokens(self, now_ms: float) -> FirstTokens:
        """Account for the prompt, whose first token is there at `now_ms`."""
        run = self.run
        assert run.first_step_ms is not None
        return FirstTokens(
            cache=run.cache_use(),
            ttft_ms=now_ms - run.arrived_ms,
            queue_ms=max(0.0, run.first_step_ms - run.arrived_ms - run.load_ms),
            load_ms=run.load_ms,
        )


@dataclass(frozen=True, eq=False, slots=True)
class Flight:
    """A step that was begun."""

    works: Sequence[Work]
    actives: Sequence[Active]
    launched: Launched
    started_ms: float
    ahead: bool
    """Whether the next one may be begun before this one is waited for."""
    loads: "Sequence[asyncio.Task[None]]"
    """What this step follows: it counts only as far as they turn out well."""


class Actives(dict[Run, Active]):
    """Every request in the engine, by its run."""

    @property
    def alone(self) -> bool:
        """Whether there is one, so that nobody else waits for the device."""
        return len(self) == 1

    def samplers(self, works: Sequence[Work]) -> list[Sampler]:
        """Return who chooses tokens of a step, in its order."""
        return [self[work.sequence].sampler for work in works if work.samples]

    def expired(self, now_ms: float) -> list[Active]:
        """Return those whose deadlines have passed."""
        return [a for a in self.values() if a.ends_ms is not None and now_ms >= a.ends_ms]

    def unnamed(self) -> Active | None:
        """Return one with full blocks that may be known by name and are not yet."""
        return next((active for active in self.values() if active.run.unnamed_blocks), None)

    def seconds_to_rest(self, now_ms: float, hold_ms: float | None) -> float | None:
        """Return the time until a deadline passes or at `hold_ms`; None: nothing is to come."""
        ends = [active.ends_ms for active in self.values()]
        known = [end for end in (*ends, hold_ms) if end is not None]
        return max(0.0, min(known) - now_ms) / 1000 if known else None
