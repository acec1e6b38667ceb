"""Picks an endpoint for one HTTP request, and tells the router what became of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Final

from kvstore.adapters.placing import prompt_to_place, root_of
from kvstore.adapters.prompts import PromptReader, Reading
from kvstore.core.errors import BadInput, Refused
from kvstore.core.limits import MAX_DEADLINE_MS
from kvstore.core.names import Root
from kvstore.observe.pick_metrics import PickMetrics
from kvstore.router.learning import Actual
from kvstore.router.placement import Decision, Prompt
from kvstore.router.router import Router
from kvstore.rpc.convert import check_id

FAIRNESS: Final = "x-gateway-inference-fairness-id"
"""Who shares fairly with whom: the router's domain."""
TTFT_SLO: Final = "x-slo-ttft-ms"
"""Refuse the request where no endpoint answers so soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PickerConfig:
    """How requests of a gateway are placed."""

    root: Root
    """What prompts are named under: the router's `--vllm-root`."""
    base_models: frozenset[str] = frozenset()
    """Names of the model itself; another name is an adapter. Empty: every name is the model."""
    fallbacks: int = 0
    """Further endpoints named behind the best, for proxies that try them in turn."""
    patience_ms: float = 30_000
    """How long a request waits for an endpoint to have room; none alive is told at once."""
    max_body_bytes: int = 4 << 20
    """A request's body that is held until its endpoint is known."""

    def __post_init__(self) -> None:
        if not 0 <= self.fallbacks <= 16:
            raise BadInput(f"fallbacks is {self.fallbacks}, not 0 to 16")
        if not 0 < self.patience_ms <= MAX_DEADLINE_MS:
            raise BadInput(f"patience_ms is {self.patience_ms}, not above 0 to {MAX_DEADLINE_MS}")
        if self.max_body_bytes <= 0:
            raise BadInput(f"max_body_bytes must be positive, got {self.max_body_bytes}")


@dataclass(frozen=True, slots=True)
class Pick:
    """Where a request goes."""

    endpoints: tuple[str, ...]
    """Preferred first."""
    booking: int
    exact: bool
    """Whether the router saw the tokens that the engine sees."""
    made_s: float


@dataclass(frozen=True, slots=True)
class Denial:
    """Why a request goes nowhere."""

    status: int
    message: str
    retry_after_ms: int = 0


class Picker:
    """Over one router; shared by every exchange."""

    def __init__(
        self, router: Router, reader: PromptReader, config: PickerConfig, metrics: PickMetrics
    ) -> None:
        self._router = router
        self._reader = reader
        self.config = config
        self.metrics = metrics

    async def pick(
        self, headers: Mapping[str, str], body: bytes, subset: frozenset[str] | None
    ) -> Pick | Denial:
        """Return where a request goes, and book it there; or why it goes nowhere."""
        started_s = perf_counter()
        reading = await self._reader.read_body(body) if body else None
        read = "none" if reading is None else "tokens" if reading.exact else "text"
        self.metrics.prompts.labels(read=read).inc()
        try:
            prompt = self._prompt(headers, reading, subset)
        except BadInput as error:
            return self._denied("refused", Denial(400, str(error)))
        try:
            decision = await self._router.route(
                prompt, wait_ms=0, deadline_ms=self.config.patience_ms
            )
        except Refused as refusal:
            return self._refused(prompt, refusal)
        self.metrics.seconds.observe(perf_counter() - started_s)
        self.metrics.picks.labels(outcome="picked").inc()
        exact = reading is not None and reading.exact
        return Pick(self._endpoints(decision), decision.booking, exact, perf_counter())

    def too_large(self) -> Denial:
        """Return what a body over the bound gets."""
        limit = self.config.max_body_bytes
        return self._denied("refused", Denial(413, f"request body over {limit} bytes"))

    def first_token(self, pick: Pick) -> None:
        """Take a request off its endpoint's queue: it answers."""
        self._router.first_token(pick.booking, None)

    def answered(self, pick: Pick, *, cached_tokens: int | None, ttft_ms: float) -> None:
        """Free the booking, and learn where tokens were seen on both sides."""
        actual = None
        if pick.exact and cached_tokens is not None:
            actual = Actual(hit_tokens=cached_tokens, ttft_ms=ttft_ms)
        self._router.complete(pick.booking, actual=actual)

    def failed(self, pick: Pick, reason: str) -> None:
        """Free the booking. An endpoint that was passed over or broke is left alone a moment."""
        self.metrics.failures.labels(reason=reason).inc()
        # Whoever asked may have hung up: that says nothing about the endpoint.
        self._router.complete(pick.booking, failed=reason != "gone")

    def _prompt(
        self, headers: Mapping[str, str], reading: Reading | None, subset: frozenset[str] | None
    ) -> Prompt:
        domain = headers.get(FAIRNESS, "")
        if domain:
            check_id(domain, FAIRNESS)
        among = None
        if subset is not None:
            workers = self._router.members.workers()
            among = frozenset(one.name for one in workers if one.address in subset)
        root = self.config.root
        if reading is not None:
            root = root_of(root, reading, self.config.base_models)
        return prompt_to_place(
            self._router, root, reading, among=among, domain=domain, ttft_slo_ms=_slo_ms(headers)
        )

    def _endpoints(self, decision: Decision) -> tuple[str, ...]:
        members = self._router.members.by_name
        others = (members[score.name].address for score in decision.scores if score.name in members)
        ranked = dict.fromkeys((decision.address, *others))
        return tuple(ranked)[: 1 + self.config.fallbacks]

    def _refused(self, prompt: Prompt, refusal: Refused) -> Denial:
        """Say whether nobody is there, or all have enough to do."""
        try:
            self._router.explain(prompt)
        except Refused:
            return self._denied("none_ready", Denial(503, str(refusal), refusal.retry_after_ms))
        return self._denied("shed", Denial(429, str(refusal), refusal.retry_after_ms))

    def _denied(self, outcome: str, denial: Denial) -> Denial:
        self.metrics.picks.labels(outcome=outcome).inc()
        return denial


def _slo_ms(headers: Mapping[str, str]) -> float:
    """Return the time to the first token that a request asks for; raises `BadInput`."""
    text = headers.get(TTFT_SLO, "")
    if not text:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_DEADLINE_MS:
        raise BadInput(f"{TTFT_SLO} is {text[:32]!r}, not 0 to {MAX_DEADLINE_MS}")
    return value
