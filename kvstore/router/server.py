"""Serves the `Router` service: placement for frontends that talk to engines themselves."""

from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry

from kvstore.core.errors import BadInput, NotFound
from kvstore.core.limits import MAX_DEADLINE_MS
from kvstore.core.names import BlockName, split_names
from kvstore.directory.events import TierKind
from kvstore.observe.metrics import RouterMetrics
from kvstore.router.learning import Actual
from kvstore.router.members import Members
from kvstore.router.placement import Decision, Prompt
from kvstore.router.router import Router, RouterConfig
from kvstore.rpc.channel import NO_SECURITY, listen, make_server
from kvstore.rpc.convert import check_id, check_names, root_from_wire
from kvstore.rpc.credentials import Credentials
from kvstore.rpc.gate import gate_of
from kvstore.rpc.interceptors import Context
from kvstore.rpc.security import SecurityConfig
from kvstore.rpc.v1 import router_pb2, router_pb2_grpc

MAX_EXCLUDED = 256
"""Workers one request may exclude: more is a mistake."""


def prompt_of(request: router_pb2.RouteRequest, router: Router) -> Prompt:
    """Return what a caller wants placed; raises `BadInput` naming the field at fault."""
    root = root_from_wire(request.root)
    if len(request.exclude) > MAX_EXCLUDED:
        raise BadInput(f"{len(request.exclude)} workers excluded; {MAX_EXCLUDED} allowed")
    exclude = frozenset(check_id(name, "exclude") for name in request.exclude)
    names: list[BlockName]
    if request.tokens and request.names:
        raise BadInput("tokens and names exclude each other")
    if request.tokens:
        names, tokens = router.names(root, request.tokens), len(request.tokens) // 4
    else:
        check_names(request.names)
        names, tokens = split_names(request.names), request.prompt_tokens
    if request.domain:
        check_id(request.domain, "domain")
    if request.ttft_slo_ms > MAX_DEADLINE_MS:
        raise BadInput(f"ttft_slo_ms {request.ttft_slo_ms} is over {MAX_DEADLINE_MS}")
    return Prompt(
        root, names, tokens, exclude, domain=request.domain, priority=request.priority,
        ttft_slo_ms=request.ttft_slo_ms,
    )  # fmt: skip


def reply_of(decision: Decision) -> router_pb2.RouteReply:
    """Return the wire form of a decision."""
    reply = router_pb2.RouteReply(
        worker=decision.worker,
        address=decision.address,
        booking=decision.booking,
        hit_tokens=decision.hit_tokens,
        predicted_ttft_ms=decision.predicted_ttft_ms,
        missed=decision.missed,
    )
    for step in decision.plan:
        reply.plan.add(first=step.first, count=step.count, tier=int(step.tier), place=step.place)
    return reply


def actual_of(request: router_pb2.CompleteRequest) -> Actual | None:
    """Return what a caller says became of a booking; None when it says nothing."""
    if request.HasField("cache"):
        report = request.cache
        by_tier = {tier: getattr(report, f"{tier.name.lower()}_tokens") for tier in TierKind}
        hit_tokens = sum(by_tier.values())
    else:
        by_tier, hit_tokens = None, request.hit_tokens
        if not hit_tokens and not request.ttft_ms:
            return None
    for field in ("ttft_ms", "queue_ms", "load_ms"):
        value = getattr(request, field)
        if not 0 <= value <= MAX_DEADLINE_MS:
            raise BadInput(f"{field} is {value}, not 0 to {MAX_DEADLINE_MS}")
    return Actual(
        hit_tokens=hit_tokens,
        ttft_ms=request.ttft_ms,
        queue_ms=request.queue_ms if request.HasField("queue_ms") else None,
        load_ms=request.load_ms if request.HasField("load_ms") else None,
        by_tier=by_tier,
    )


class RouterServicer(router_pb2_grpc.RouterServicer):  # type: ignore[misc]
    """Route, Complete and Explain over one router."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def Route(
        self, request: router_pb2.RouteRequest, context: Context
    ) -> router_pb2.RouteReply:
        """Choose a worker and book the load."""
        if request.deadline_ms > MAX_DEADLINE_MS:
            raise BadInput(f"deadline_ms {request.deadline_ms} is over {MAX_DEADLINE_MS}")
        wait_ms = float(request.deadline_ms) if request.deadline_ms else None
        prompt = prompt_of(request, self._router)
        decision = await self._router.route(prompt, wait_ms=wait_ms, deadline_ms=wait_ms)
        return reply_of(decision)

    async def Complete(
        self, request: router_pb2.CompleteRequest, context: Context
    ) -> router_pb2.CompleteReply:
        """Learn, and free a booking; raises `NotFound` when it is unknown or has expired."""
        actual = None if request.failed else actual_of(request)
        if request.first_token and actual is not None:
            known = self._router.first_token(request.booking, actual)
        elif request.first_token:
            raise BadInput("first_token needs ttft_ms, hit_tokens or cache")
        else:
            known = self._router.complete(request.booking, actual=actual, failed=request.failed)
        if not known:
            raise NotFound(f"booking {request.booking} is unknown or has expired")
        return router_pb2.CompleteReply()

    async def Explain(
        self, request: router_pb2.RouteRequest, context: Context
    ) -> router_pb2.ExplainReply:
        """Say what Route would answer, for every worker."""
        decision = self._router.explain(prompt_of(request, self._router))
        reply = router_pb2.ExplainReply(chosen=reply_of(decision), explanation=decision.explanation)
        for score in decision.scores:
            reply.workers.add(
                worker=score.name,
                hit_tokens=score.hit_tokens,
                queued_tokens=score.queued_tokens,
                predicted_ttft_ms=score.ttft_s * 1_000,
                own_tokens=score.own_tokens,
                known_tokens=score.known_tokens,
                queue_ms=score.queue_s * 1_000,
                load_ms=score.plan.load_s * 1_000,
                prefill_ms=score.plan.compute_s * 1_000,
                others_ms=score.others_s * 1_000,
            )
        for name, why in decision.excluded.items():
            reply.workers.add(worker=name, excluded=why)
        return reply


class RouterServer:
    """A router and its gRPC server in one process."""

    def __init__(
        self,
        members: Members,
        *,
        config: RouterConfig | None = None,
        security: SecurityConfig = NO_SECURITY,
    ) -> None:
        self._members = members
        self._security = security
        self.registry = CollectorRegistry()
        self.gate = gate_of(security, self.registry)
        """Who may call; other servers of this process share it."""
        credentials = Credentials.of(security)
        self.router = Router(
            metrics=RouterMetrics(self.registry),
            config=config,
            credentials=credentials,
        )
        self.address = ""
        """Where it listens, once started."""

    async def start(self, address: str) -> None:
        """Follow the members and serve; raises `BadInput` when `address` cannot be bound."""
        self._server, self._health = make_server(gate=self.gate)
        router_pb2_grpc.add_RouterServicer_to_server(RouterServicer(self.router), self._server)
        self.address = listen(self._server, address, self._security)
        self.router.set_members(self._members)
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, *, grace_ms: int = 1_000) -> None:
        """End: calls in flight get `grace_ms`."""
        await self.router.close()
        await self._server.stop(grace_ms / 1_000)
