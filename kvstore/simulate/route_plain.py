"""Routers that are nobody's in particular: the plain ones, and the reference that knows all."""

import random
import zlib
from collections.abc import Iterable
from typing import Final

from kvstore.simulate.route_cluster import Cluster, Job
from kvstore.simulate.trace import TraceRequest

_AFFINITY_BLOCKS: Final = 4


class Plain:
    """A router that remembers nothing of its jobs; base of the others."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def choose(self, request: TraceRequest) -> int:
        """Return the worker for a request that arrives now."""
        raise NotImplementedError

    def sent(self, job: Job) -> None:
        """Hear that a request was queued."""

    def first_token(self, job: Job) -> None:
        """Hear that a prompt is computed."""

    def ended(self, job: Job) -> None:
        """Hear that a request is done."""

    def least_requests(self, among: Iterable[int] | None = None) -> int:
        """Return the worker with the fewest requests in flight; of equals the first."""
        workers = self.cluster.workers
        places = range(len(workers)) if among is None else among
        return min(places, key=lambda at: workers[at].in_flight)

    def soonest(self, among: Iterable[int] | None = None) -> int:
        """Return the worker that is free first; of equals the first."""
        workers, now = self.cluster.workers, self.cluster.now_ms
        places = range(len(workers)) if among is None else among
        return min(places, key=lambda at: workers[at].wait_s(now))


class RoundRobin(Plain):
    """One after another."""

    _next = -1

    def choose(self, request: TraceRequest) -> int:
        """Return the next worker."""
        self._next = (self._next + 1) % len(self.cluster.workers)
        return self._next


class Random(Plain):
    """Any worker, alike; the same sequence in every run."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self._dice = random.Random(0)

    def choose(self, request: TraceRequest) -> int:
        """Return any worker."""
        return self._dice.randrange(len(self.cluster.workers))


class LeastLoaded(Plain):
    """Shortest queue in seconds, known exactly; blind to caches."""

    def choose(self, request: TraceRequest) -> int:
        """Return the worker that is free first."""
        return self.soonest()


class LeastRequests(Plain):
    """Fewest requests in flight."""

    def choose(self, request: TraceRequest) -> int:
        """Return the worker with the fewest requests."""
        return self.least_requests()


class Affinity(Plain):
    """By a hash of the first four blocks."""

    def choose(self, request: TraceRequest) -> int:
        """Return the worker that these blocks always go to."""
        first = request.blocks[:_AFFINITY_BLOCKS]
        return (first[-1] if first else 0) % len(self.cluster.workers)


class Sticky(Plain):
    """Sessions stay with the worker that a hash of their name says; others go round."""

    _next = -1

    def choose(self, request: TraceRequest) -> int:
        """Return the session's worker."""
        if request.session:
            return zlib.crc32(request.session.encode()) % len(self.cluster.workers)
        self._next = (self._next + 1) % len(self.cluster.workers)
        return self._next


class LongestPrefix(Plain):
    """Most blocks cached; of equals the one that is free first."""

    def choose(self, request: TraceRequest) -> int:
        """Return the worker with the longest prefix."""
        depths = self.cluster.depths(request.blocks)
        best = max(depths)
        return self.soonest(at for at, depth in enumerate(depths) if depth == best)


class Exact(Plain):
    """Least time to first token, from the true queues and caches: nobody can know that."""

    def choose(self, request: TraceRequest) -> int:
        """Return the worker that will answer first."""
        cluster = self.cluster
        services = cluster.services(request, cluster.depths(request.blocks))
        return min(range(len(services)), key=lambda at: cluster.ttft_s(at, services[at]))
