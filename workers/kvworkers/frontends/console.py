"""The console: one page about the cluster, served by the frontend itself at `/console`.

Shows sizes, places, times and reasons, never what anybody wrote. The page is three static files
without any address but this server's; everything else comes from `/console/state`.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from kvstore.core.errors import Forbidden, NotFound
from kvstore.core.limits import BLOCK_TOKENS
from kvstore.directory.events import TierKind
from kvstore.router.heat import HotPrefix
from kvstore.router.router import Router
from kvstore.router.survey import MemberState
from kvworkers.frontends.history import STEP_S, History, Step
from kvworkers.frontends.ledger import Entry
from kvworkers.frontends.pipeline import Pipeline

SHOWN_REQUESTS: Final = 50
SHOWN_MEMBERS: Final = 512
SHOWN_PREFIXES: Final = 20
HOT_EVERY_S: Final = 2.0
"""Looking for hot prefixes goes through all of them: not more often, however many pages ask."""

_FILES: Final = {
    "": ("console.html", "text/html; charset=utf-8"),
    "/console.css": ("console.css", "text/css; charset=utf-8"),
    "/console.js": ("console.js", "text/javascript; charset=utf-8"),
}
_HEADERS: Final = {
    # Nothing from elsewhere, and nobody else may frame it.
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self';"
    " connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Console:
    """What the page shows, gathered from one frontend's pipeline and router."""

    def __init__(self, pipeline: Pipeline, router: Router) -> None:
        self._pipeline = pipeline
        self._router = router
        self._history = History(pipeline.ledger)
        self._hot: tuple[float, list[HotPrefix]] = (float("-inf"), [])

    async def run(self) -> None:
        """Keep the history until cancelled."""
        while True:
            await asyncio.sleep(STEP_S)
            running = self._pipeline.ledger.running
            self._history.note(time.time(), running=running, waiting=self._router.waiting)

    def state(self) -> dict[str, Any]:
        """Return all that the page shows, as it is now."""
        ledger, members = self._pipeline.ledger, self._router.survey()
        totals = ledger.totals
        return {
            "now": time.time(),
            "models": sorted(self._pipeline.fleet.offers()),
            "running": ledger.running,
            "waiting": self._router.waiting,
            "totals": {
                "ended": totals.ended,
                "prompt_tokens": totals.prompt_tokens,
                "by_tier": _by_tier(totals.by_tier),
                "ttft_ms": totals.ttft_ms / totals.first_tokens if totals.first_tokens else None,
            },
            "history": {"step_s": STEP_S, "steps": list(map(_step, self._history.steps()))},
            "members": [_member(one) for one in members[:SHOWN_MEMBERS]],
            "members_left_out": max(0, len(members) - SHOWN_MEMBERS),
            "requests": [_request(one) for one in _first(ledger.latest(), SHOWN_REQUESTS)],
            "hot": [_prefix(one) for one in self._hottest()],
            "domains": [
                {
                    "domain": domain,
                    "requests": usage.requests,
                    "prompt_tokens": usage.prompt_tokens,
                    "cached_tokens": usage.cached_tokens,
                    "output_tokens": usage.output_tokens,
                }
                for domain, usage in ledger.usage.items()
            ],
        }

    def explanation(self, request_id: str) -> dict[str, Any]:
        """Return why a recent request went where it went; raises `NotFound`."""
        for entry in self._pipeline.ledger.latest():
            if entry.request_id == request_id:
                return _explained(entry)
        raise NotFound("no recent request is called so")

    def _hottest(self) -> list[HotPrefix]:
        now = time.monotonic()
        if now - self._hot[0] >= HOT_EVERY_S:
            self._hot = now, self._router.hottest(SHOWN_PREFIXES)
        return self._hot[1]


def add_console(app: FastAPI, console: Console, *, loopback_only: bool) -> None:
    """Serve the console under `/console`.

    `loopback_only`: this server listens on loopback, without asking who comes. Then only pages
    that were opened under a name of this machine may read it: a foreign one that has its own name
    lead here (DNS rebinding) must not.
    """

    def check(request: Request) -> None:
        if loopback_only and not _is_loopback(request.url.hostname or ""):
            raise Forbidden("the console answers to names of this machine only")

    for path, (name, media_type) in _FILES.items():
        app.get(f"/console{path}")(_static(name, media_type, check))

    @app.get("/console/state")
    async def state(request: Request) -> Response:
        """Return what the page shows."""
        check(request)
        return JSONResponse(console.state(), headers=_HEADERS)

    @app.get("/console/requests/{request_id}")
    async def explanation(request: Request, request_id: str) -> Response:
        """Return why one request went where it went."""
        check(request)
        return JSONResponse(console.explanation(request_id), headers=_HEADERS)


def is_loopback_address(address: str) -> bool:
    """Say whether `host:port` is on loopback."""
    return _is_loopback(address.rpartition(":")[0].strip("[]"))


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _static(name: str, media_type: str, check: Callable[[Request], None]) -> Any:
    body = (files("kvworkers.frontends") / "console_page" / name).read_bytes()

    async def answer(request: Request) -> Response:
        check(request)
        return Response(body, media_type=media_type, headers=_HEADERS)

    return answer


def _first(entries: Iterable[Entry], most: int) -> list[Entry]:
    return [entry for entry, _ in zip(entries, range(most), strict=False)]


def _by_tier(tokens: dict[TierKind, int]) -> dict[str, int]:
    return {tier.name.lower(): tokens[tier] for tier in TierKind}


def _step(step: Step) -> dict[str, Any]:
    return {
        "at": step.at_s,
        "ended": step.ended,
        "prompt_tokens": step.prompt_tokens,
        "by_tier": _by_tier(dict(zip(TierKind, step.by_tier, strict=True))),
        "ttft_ms": step.ttft_ms,
        "running": step.running,
        "waiting": step.waiting,
    }


def _member(one: MemberState) -> dict[str, Any]:
    load = one.load
    return {
        "name": one.name,
        "kind": one.kind,
        "host": one.host,
        "address": one.address,
        "health": str(one.health),
        "silence_ms": round(one.silence_ms),
        "blocks": {tier.name.lower(): count for tier, count in sorted(one.blocks.items())},
        "load": None if load is None else {
            "running": load.running,
            "waiting": load.waiting,
            "queued_tokens": load.queued_tokens,
            "kv_used_bytes": load.kv_used_bytes,
            "kv_capacity_bytes": load.kv_capacity_bytes,
            "prefill_tokens_per_s": load.prefill_tokens_per_s,
            "decode_tokens_per_s": load.decode_tokens_per_s,
            "draining": load.draining,
        },
    }  # fmt: skip


def _request(entry: Entry) -> dict[str, Any]:
    cache, decision = entry.cache, entry.decision
    predicted = entry.split or decision
    return {
        "id": entry.request_id,
        "began": entry.began_s,
        "domain": entry.domain,
        "model": entry.model,
        "prompt_tokens": entry.prompt_tokens,
        "by_tier": None if cache is None else _by_tier(cache.by_tier),
        "miss_reason": "" if cache is None else cache.miss_reason.name.lower(),
        "ttft_ms": entry.ttft_ms or None,
        "predicted_ttft_ms": None if predicted is None else predicted.predicted_ttft_ms,
        "worker": "" if decision is None else decision.worker,
        "prefill_worker": entry.computed_by,
        "output_tokens": entry.output_tokens,
        "retries": entry.retries,
        "outcome": entry.outcome,
    }


def _explained(entry: Entry) -> dict[str, Any]:
    decision = entry.decision
    plan = () if decision is None else decision.plan
    return {
        "id": entry.request_id,
        "worker": "" if decision is None else decision.worker,
        "hit_tokens": 0 if decision is None else decision.hit_tokens,
        "plan": [
            {
                "first_token": step.first * BLOCK_TOKENS,
                "tokens": step.count * BLOCK_TOKENS,
                "tier": step.tier.name.lower(),
                "place": step.place,
            }
            for step in plan
        ],
        "explanation": _explanation(entry),
        "places": "" if entry.cache is None else entry.cache.places,
    }


def _explanation(entry: Entry) -> str:
    """Say why a request went where it went; of one that was split, both times."""
    if entry.decision is None:
        return "not placed yet"
    before = f"{entry.split.explanation}\n\n" if entry.split is not None else ""
    return before + entry.decision.explanation


def _prefix(one: HotPrefix) -> dict[str, Any]:
    return {
        "name": one.name.hex(),
        "tokens": one.blocks * BLOCK_TOKENS,
        "busy": one.rate,
    }
