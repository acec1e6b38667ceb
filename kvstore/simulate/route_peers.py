"""The published routers' formulas, with their published weights.

Each sees the true caches and its own load counters at once, without delay, unless it is in its
nature not to (SGLang keeps a tree of what it sent). So a row is the most its formula can do.
A "request in flight" has been sent and has not ended; a block is the trace's.
"""

import math
import zlib
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Final

from kvstore.directory.policy import BlockKey
from kvstore.simulate.route_cluster import Cluster, Job, Service
from kvstore.simulate.route_plain import Plain
from kvstore.simulate.trace import TraceRequest


class Sglang(Plain):
    """SGLang gateway and vllm-router, `cache_aware`.

    Balances by requests when loads differ by more than 64 and 1.5 times; else the best match in the
    router's own tree when it is above 0.3 of the prompt, else fewest requests. The tree never
    hears of evictions; every 120 s it is cut to 2^26 characters per worker, here at 4 a token.
    """

    _ABSOLUTE, _RELATIVE, _MATCH = 64, 1.5, 0.3
    _EVERY_MS, _TREE_TOKENS = 120_000.0, (1 << 26) // 4

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self._trees: list[OrderedDict[BlockKey, None]] = [OrderedDict() for _ in cluster.workers]
        self._tree_blocks = max(1, self._TREE_TOKENS // cluster.block_tokens)
        self._cut_ms = 0.0

    def choose(self, request: TraceRequest) -> int:
        """Return the worker with the best match, or with the fewest requests."""
        if self.cluster.now_ms - self._cut_ms >= self._EVERY_MS:
            self._cut()
        at = self._chosen(request.blocks)
        tree = self._trees[at]
        for block in reversed(request.blocks):
            tree[block] = None
            tree.move_to_end(block)
        return at

    def _chosen(self, blocks: Sequence[BlockKey]) -> int:
        loads = [worker.in_flight for worker in self.cluster.workers]
        if max(loads) - min(loads) > self._ABSOLUTE and max(loads) > self._RELATIVE * min(loads):
            return self.least_requests()
        matches = [_match(tree, blocks) for tree in self._trees]
        best = max(matches)
        if best > self._MATCH * len(blocks):
            return matches.index(best)
        return self.least_requests()

    def _cut(self) -> None:
        self._cut_ms = self.cluster.now_ms
        for tree in self._trees:
            while len(tree) > self._tree_blocks:
                tree.popitem(last=False)


def _match(tree: OrderedDict[BlockKey, None], blocks: Sequence[BlockKey]) -> int:
    for depth, block in enumerate(blocks):
        if block not in tree:
            return depth
    return len(blocks)


class Dynamo(Plain):
    """Dynamo's KV router; lowest wins: w * max(prefill + prompt - cached, 0) + decode blocks.

    Cached counts 1.0 on the device and, beyond, 0.5 in a shared tier. Decode blocks are those of
    all requests in flight and this one's; output growth is not counted.
    """

    prefill_load_scale = 1.0

    def choose(self, request: TraceRequest) -> int:
        """Return the worker of the lowest cost; of equals the first."""
        prefill = self.prefill_blocks(request)
        size, workers = self.cluster.block_tokens, self.cluster.workers
        prompt = request.input_tokens / size
        return min(
            range(len(workers)),
            key=lambda at: (
                self.prefill_load_scale * prefill[at] + workers[at].kv_tokens / size + prompt
            ),
        )

    def prefill_blocks(self, request: TraceRequest) -> list[float]:
        """Return for each worker the blocks to compute, this request's included."""
        cluster, size = self.cluster, self.cluster.block_tokens
        depths = cluster.depths(request.blocks)
        beyond = {depth: cluster.pool_run(request.blocks, depth) - depth for depth in set(depths)}
        prompt = request.input_tokens / size
        return [
            max(0.0, worker.uncached_tokens / size + prompt - depth - 0.5 * beyond[depth])
            for worker, depth in zip(cluster.workers, depths, strict=True)
        ]


class DynamoPrefill(Dynamo):
    """The same with the prefill term weighted four times."""

    prefill_load_scale = 4.0


class LMetric(Dynamo):
    """Dynamo's `lmetric`: blocks to compute times requests in flight, this one included."""

    def choose(self, request: TraceRequest) -> int:
        """Return the worker of the lowest product; of equals the first."""
        prefill, workers = self.prefill_blocks(request), self.cluster.workers
        return min(
            range(len(workers)),
            key=lambda at: (prefill[at] * (workers[at].in_flight + 1), workers[at].in_flight),
        )


class LlmD(Plain):
    """llm-d and the Gateway API's scorer: a weighted sum of scores in [0, 1]; highest wins.

    Weights of its precise-prefix guide: prefix (blocks matched over all) 3, free KV 2, queue 2.
    """

    _PREFIX, _FREE, _QUEUE = 3.0, 2.0, 2.0

    def choose(self, request: TraceRequest) -> int:
        """Return the worker of the highest sum; of equals the one with the fewest requests."""
        cluster, workers = self.cluster, self.cluster.workers
        depths = cluster.depths(request.blocks)
        queues = [worker.waiting for worker in workers]
        low, spread = min(queues), max(queues) - min(queues)
        room = cluster.worker_blocks * cluster.block_tokens

        def total(at: int) -> float:
            queue = 1 - (queues[at] - low) / spread if spread else 1.0
            free = 1 - min(1.0, workers[at].kv_tokens / room)
            prefix = depths[at] / max(1, len(request.blocks))
            return self._PREFIX * prefix + self._FREE * free + self._QUEUE * queue

        return max(range(len(workers)), key=lambda at: (total(at), -workers[at].in_flight))


class Aibrix(Plain):
    """AIBrix `prefix-cache`: fewest requests when they differ by more than 8; else the best match
    among workers with at most mean + one standard deviation of requests."""

    _IMBALANCE = 8

    def choose(self, request: TraceRequest) -> int:
        """Return the best match that is not too busy."""
        loads = [worker.in_flight for worker in self.cluster.workers]
        if max(loads) - min(loads) > self._IMBALANCE:
            return self.least_requests()
        mean = sum(loads) / len(loads)
        limit = mean + math.sqrt(sum((load - mean) ** 2 for load in loads) / len(loads))
        depths = self.cluster.depths(request.blocks)
        fit = [at for at, load in enumerate(loads) if load <= limit]
        return max(fit, key=lambda at: (depths[at], -loads[at]))


class ProductionStack(Plain):
    """vLLM production-stack `kvaware`: the first worker that has all but 2,000 tokens of the
    prompt; else the session's place on a ring, or the fewest requests."""

    _THRESHOLD_TOKENS = 2_000

    def choose(self, request: TraceRequest) -> int:
        """Return the first holder, the session's worker or the one with the fewest requests."""
        cluster = self.cluster
        wanted = max(1, request.input_tokens - self._THRESHOLD_TOKENS)
        for at, depth in enumerate(cluster.depths(request.blocks)):
            if min(depth * cluster.block_tokens, request.input_tokens) >= wanted:
                return at
        if request.session:
            return zlib.crc32(request.session.encode()) % len(cluster.workers)
        return self.least_requests()


class Preble(Plain):
    """Preble's E2: more cached than not: the least loaded of the best holders; else the least
    load plus prefill. Load is the seconds sent there in the last three minutes. Its cost of
    evicting is left out: no formula of it is at hand."""

    _WINDOW_MS: Final = 180_000.0

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self._loads = [0.0] * len(cluster.workers)
        self._sent: deque[tuple[float, int, float]] = deque()

    def choose(self, request: TraceRequest) -> int:
        """Exploit or explore."""
        cluster = self.cluster
        while self._sent and self._sent[0][0] <= cluster.now_ms - self._WINDOW_MS:
            _, at, seconds = self._sent.popleft()
            self._loads[at] -= seconds
        depths = cluster.depths(request.blocks)
        best = max(depths)
        if 2 * best * cluster.block_tokens > request.input_tokens:
            holders = [at for at, depth in enumerate(depths) if depth == best]
            return min(holders, key=lambda at: self._loads[at])
        services = cluster.services(request, depths)
        costs = [service.load_s + service.compute_s for service in services]
        return min(range(len(depths)), key=lambda at: self._loads[at] + costs[at])

    def sent(self, job: Job) -> None:
        """Count the load sent."""
        seconds = job.service.load_s + job.service.compute_s
        self._loads[job.worker] += seconds
        self._sent.append((job.sent_ms, job.worker, seconds))


class Mooncake(Plain):
    """Mooncake's paper: least transfer + queue + prefill, each estimated from true lengths.

    A longer prefix in the pool is always transferred. Its queue estimate is taken as perfect, so
    where the pool is quicker than computing this is the reference itself.
    """

    def choose(self, request: TraceRequest) -> int:
        """Return the worker of the least estimate; of equals the first."""
        cluster, rates, size = self.cluster, self.cluster.rates, self.cluster.block_tokens
        last = max(1, request.input_tokens) - 1
        depths = cluster.depths(request.blocks)

        def estimate(depth: int) -> Service:
            own = min(last, depth * size)
            pooled = max(own, min(last, cluster.pool_run(request.blocks, depth) * size))
            load_s = rates.load_s * (pooled - own)
            computed = last + 1 - pooled
            return Service(own, pooled - own, computed, load_s, rates.compute_s(pooled, last + 1))

        estimates = {depth: estimate(depth) for depth in set(depths)}
        return min(range(len(depths)), key=lambda at: cluster.ttft_s(at, estimates[depths[at]]))
