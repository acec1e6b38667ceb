"""The cases of `kvstore bench worker`. Each checks what it measured before it gives a row."""

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from fnmatch import fnmatchcase
from time import monotonic
from typing import Any, Final

from kvstore.core.errors import Corrupt
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.core.names import Fidelity
from kvworkers.bench.hidden import hidden_share
from kvworkers.bench.rig import Rig
from kvworkers.bench.storm import storm

READ_GB_S: Final = 3_126.0
"""Measured read limit of the H100 that the bars were derived for."""

PRODUCT_TFLOP_S: Final = 700.0
"""What a large bf16 matrix product reached there."""

_GENERATE_BATCH: Final = 382.0
_SDPA_MS: Final = 1_396.0
"""Recorded there, of transformers: `generate_batch`, tokens/s, and 32k tokens with sdpa."""

_APPEND_LIMIT: Final = (
    "the larger of weights and KV over 3,126 GB/s and layers' products at 700 TFLOP/s"
)

STORM: Final = "storm"
"""Its rows; `--case storm` runs it."""

HIDDEN: Final = "32k + 256 arena hidden"

Row = Callable[..., None]


def lossy_case(fidelity: Fidelity) -> str:
    """Return the name of the case over a store that keeps blocks so."""
    return f"32k + 256 arena {fidelity}"


class Cases:
    """Runs cases on one rig and hands rows to `emit`."""

    def __init__(self, rig: Rig, emit: Row, *, pattern: str, runs: int, scale: int) -> None:
        """`scale` divides lengths and batches: for a device that is no H100.

        `pattern` chooses cases by their names, as a shell's.
        """
        self._rig = rig
        self._emit = emit
        self._pattern = pattern
        self._runs = runs
        self._scale = scale
        self._seed = 1_000
        self._load_ms: list[float] = []
        self._ttft_ms: list[float] = []

    async def run(self) -> None:
        """Run every case that is wanted, cheapest first."""
        await self._decode()
        await self._throughput()
        await self._append()
        await self._long_prefix()
        await self._store_cost()
        await self._storm()

    def _wants(self, case: str) -> bool:
        return fnmatchcase(case, self._pattern)

    def _fresh(self, count: int) -> list[int]:
        self._seed += 1
        return self._rig.prompt(self._seed, max(17, count // self._scale))

    async def _decode(self) -> None:
        batch, context, out = max(1, 64 // self._scale), 2_048, 48
        if not self._wants("decode b64 c2048"):
            return
        prompts = [self._fresh(context - out // 2) for _ in range(batch)]
        labels = {"batch": str(batch)}
        name = "kvstore_worker_decode_seconds"
        before = [self._rig.metric(f"{name}_{part}", **labels) for part in ("sum", "count")]
        await asyncio.gather(*(self._rig.ask(p, out=out, no_store=True) for p in prompts))
        after = [self._rig.metric(f"{name}_{part}", **labels) for part in ("sum", "count")]
        seconds, steps = (b - a for a, b in zip(before, after, strict=True))
        taken = seconds / max(1, steps) * 1e3
        floor = self._read_ms(batch * (context // self._scale))
        self._emit(
            "decode b64 c2048", taken, "ms", limit=floor,
            limit_name="weights without embedding and KV over 3,126 GB/s", runs=int(steps),
        )  # fmt: skip

    def _read_ms(self, tokens: int) -> float:
        """Return how long reading the weights, and K and V of so many tokens, takes at least."""
        model = self._rig.model
        weights = sum(p.numel() * p.element_size() for p in model.module.parameters())
        embedding = model.module.get_input_embeddings().weight
        read = weights - embedding.numel() * embedding.element_size()
        read += tokens // BLOCK_TOKENS * model.spec.layout.block_bytes
        return float(read / READ_GB_S / 1e6)

    def _append_ms(self, new: int, held: int) -> float:
        """Return how long a step of `new` tokens takes at least: to read, or in the products."""
        layers = sum(p.numel() for p in self._rig.model.module.model.layers.parameters())
        return max(self._read_ms(held), float(2 * layers * new / PRODUCT_TFLOP_S / 1e9))

    async def _throughput(self) -> None:
        if not self._wants("64 x 512 in 128 out"):
            return
        count, out = max(1, 64 // self._scale), 128
        rates = []
        for _ in range(3):
            prompts = [self._fresh(512) for _ in range(count)]
            began = monotonic()
            replies = await asyncio.gather(*(self._rig.ask(p, out=out) for p in prompts))
            rates.append(sum(len(r.tokens) for r in replies) / (monotonic() - began))
        self._emit(
            "64 x 512 in 128 out", statistics.median(rates), "tokens/s", runs=3,
            peer=_GENERATE_BATCH, peer_name="transformers generate_batch, H100, 8B, recorded",
        )  # fmt: skip

    async def _storm(self) -> None:
        """Report what a request gets per token while too few pages make some of them leave."""
        if not self._wants(STORM):
            return
        count, out = max(6, 32 // self._scale), max(64, 512 // self._scale)
        prompts = [self._fresh(4_096) for _ in range(count)]
        busy, calm = await storm(self._rig, prompts, out=out)
        shape = {"runs": 1, "peer_name": "the same requests with pages for all"}
        self._emit(f"{STORM}: TPOT", busy.tpot_ms, "ms", peer=calm.tpot_ms, **shape)
        self._emit(
            f"{STORM}: throughput", busy.tokens_per_s, "tokens/s", peer=calm.tokens_per_s, **shape
        )
        self._emit(f"{STORM}: preemptions", busy.preemptions, "requests", runs=1)
        self._emit(f"{STORM}: recomputed", busy.recomputed, "requests", runs=1)
        self._emit(f"{STORM}: swapped out", busy.swapped_bytes / (1 << 20), "MiB", runs=1)

    async def _append(self) -> None:
        names = {n: f"append {n} over 8192" for n in (64, 256, 512)}
        if not any(self._wants(name) for name in names.values()):
            return
        prefix = self._fresh(8_192)
        prefix = prefix[: len(prefix) // 16 * 16]
        await self._rig.ask([*prefix, 1], no_store=False)
        for count, name in names.items():
            if self._wants(name):
                step = self._step_of(self._hit(prefix, count, "hbm"))
                new = max(17, count // self._scale)
                await self._row_of(name, step, limit=self._append_ms(new, len(prefix)))

    async def _long_prefix(self) -> None:
        cases = ("32k + 256 hbm", "32k + 256 arena", "32k + 256 recompute", HIDDEN)
        if not any(self._wants(case) for case in cases):
            return
        prefix = await self._long_stored()
        runs = max(1, self._runs // 6)
        ours = await self._times(self._recompute(prefix, 256), runs)
        base = statistics.median(ours)
        self._emit(
            cases[2], base, "ms", runs=runs,
            peer=_SDPA_MS, peer_name="transformers with sdpa, H100, 8B, recorded",
        )  # fmt: skip
        await self._row_of(cases[0], self._hit(prefix, 256, "hbm"), against=base)
        await self._row_of(cases[1], self._hit(prefix, 256, "arena"), against=base)
        if self._wants(HIDDEN):
            share = await hidden_share(
                self._rig, prefix, self._fresh, others=max(1, 16 // self._scale), runs=self._runs
            )
            self._emit(
                HIDDEN, share, "ratio", limit=1.0, runs=self._runs,
                limit_name="others lose no more beside a load than beside a hit in HBM",
            )  # fmt: skip

    async def run_kept_as(self, fidelity: Fidelity) -> None:
        """Run what depends on how exactly the rig's store keeps blocks."""
        case = lossy_case(fidelity)
        if self._wants(case):
            await self._row_of(case, self._hit(await self._long_stored(), 256, "arena"))

    async def _long_stored(self) -> list[int]:
        """Return a prompt of 32k tokens that pages and store hold."""
        prefix = self._fresh(32_768)
        prefix = prefix[: len(prefix) // 16 * 16]
        await self._rig.ask([*prefix, 1])
        await self._rig.stored()
        return prefix

    def _recompute(self, prefix: list[int], count: int) -> Callable[[], Awaitable[float]]:
        async def once() -> float:
            tokens = prefix + self._fresh(count)
            reply = await self._rig.ask(tokens, no_read=True, no_store=True)
            return reply.first.ttft_ms

        return once

    def _hit(self, prefix: list[int], count: int, place: str) -> Callable[[], Awaitable[float]]:
        async def once() -> float:
            if place == "arena":
                await self._rig.empty_pages()
            # Nothing of it is kept, so every run finds the same.
            reply = await self._rig.ask(prefix + self._fresh(count), no_store=place == "hbm")
            use = reply.first.cache
            got = use.hbm_tokens if place == "hbm" else sum(use.loaded_tokens.values())
            if got < len(prefix):
                raise Corrupt(f"{got} of {len(prefix)} tokens came from {place}: {use}")
            self._load_ms.append(reply.first.load_ms)
            return reply.first.ttft_ms

        return once

    def _step_of(self, once: Callable[[], Awaitable[float]]) -> Callable[[], Awaitable[float]]:
        """Return what times the one step of a request, from its planning to the chosen token."""

        async def step() -> float:
            name = "kvstore_worker_step_seconds"
            before = [self._rig.metric(f"{name}_{part}") for part in ("sum", "count")]
            self._ttft_ms.append(await once())
            after = [self._rig.metric(f"{name}_{part}") for part in ("sum", "count")]
            seconds, steps = (b - a for a, b in zip(before, after, strict=True))
            if steps != 1:
                raise Corrupt(f"a request of one step took {steps:.0f}")
            return seconds * 1e3

        return step

    async def _row_of(
        self,
        case: str,
        once: Callable[[], Awaitable[float]],
        *,
        against: float | None = None,
        limit: float | None = None,
    ) -> None:
        if not self._wants(case):
            return
        self._load_ms, self._ttft_ms = [], []
        times = await self._times(once, self._runs)
        middle = statistics.median(times)
        self._emit(
            case, middle, "ms", peer=against,
            peer_name="own recompute" if against else None, runs=len(times),
            limit=limit, limit_name=_APPEND_LIMIT if limit else None,
            load_ms=statistics.median(self._load_ms),
            ttft_ms=statistics.median(self._ttft_ms) if self._ttft_ms else None,
        )  # fmt: skip

    async def _times(self, once: Callable[[], Awaitable[float]], runs: int) -> list[float]:
        await once()
        times = []
        for _ in range(runs):
            await self._rig.stored()
            times.append(await once())
        return times

    async def _store_cost(self) -> None:
        if not self._wants("store on, all misses*"):
            return
        pairs, count = max(3, self._runs), max(1, 8 // self._scale)
        ratios: dict[str, list[float]] = {"throughput": [], "ttft": []}
        for pair in range(pairs + 1):
            found: dict[bool, tuple[float, float]] = {}
            for store in (True, False) if pair % 2 else (False, True):
                found[store] = await self._burst(count, store=store)
            if pair:
                ratios["throughput"].append(found[False][0] / found[True][0])
                ratios["ttft"].append(found[False][1] / found[True][1])
        for what, values in ratios.items():
            values.sort()
            low, high = values[len(values) // 20], values[-1 - len(values) // 20]
            self._emit(
                f"store on, all misses: {what}", statistics.median(values), "ratio", limit=1.0,
                limit_name=f"store off; middle 90 % from {low:.3f} to {high:.3f}", runs=pairs,
            )  # fmt: skip

    async def _burst(self, count: int, *, store: bool) -> tuple[float, float]:
        """Return seconds and mean TTFT of `count` prompts that nobody has seen."""
        prompts: list[list[int]] = [self._fresh(2_048) for _ in range(count)]
        began = monotonic()
        asked: list[Any] = [self._rig.ask(p, out=32, no_store=not store) for p in prompts]
        replies = await asyncio.gather(*asked)
        seconds = monotonic() - began
        await self._rig.stored()
        return seconds, statistics.mean(reply.first.ttft_ms for reply in replies)
