"""Brings a cluster up from the driver's side, watches it, and ends it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from kvstore.core.errors import Unreachable
from kvstore.rpc.security import load_security
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.controller import Controller, Status
from kvworkers.cluster.plan import Phase, Report, Role
from kvworkers.cluster.ray_runtime import joined_ray, local_ray

READY_SECONDS: Final = 240.0
"""Everything must serve by then: a cold start on two busy cores took 60 s."""

_POLL_SECONDS: Final = 0.2
_STATUS_SECONDS: Final = 20.0
_STOP_SECONDS: Final = 15.0
_TOLD: Final = ("name", "role", "address", "metrics", "pid")


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a running cluster is reached."""

    http: str
    """`http://host:port`, OpenAI-compatible under `/v1`."""
    grpc: str
    """`host:port` of `kvstore.rpc.v1.Inference`."""
    model: str
    """What requests call the model."""
    parts: list[dict[str, str | int]]
    """Every process with a server: name, role, address, metrics, pid."""


class RunningCluster:
    """A cluster that is up. Made by `running_cluster`."""

    def __init__(self, ray: Any, controller: Any, *, scheme: str = "http") -> None:
        self._scheme = scheme
        self._ray = ray
        self._controller = controller

    def status(self) -> Status:
        """Return what the controller knows; raises `Unreachable` when it does not answer."""
        try:
            status: Status = self._ray.get(
                self._controller.status.remote(), timeout=_STATUS_SECONDS
            )
        except self._ray.exceptions.RayError as error:
            raise Unreachable(f"the controller does not answer: {error}") from error
        return status

    def part(self, name: str) -> Report:
        """Return the last report of one part; raises `Unreachable` when there is none."""
        for report in self.status().parts:
            if report.name == name:
                return report
        raise Unreachable(f"{name} has not reported")

    def endpoints(self) -> Endpoints:
        """Return where to send requests."""
        status = self.status()
        reports = status.parts
        parts = [{field: getattr(report, field) for field in _TOLD} for report in reports]
        control = {"address": status.control, "metrics": status.metrics}
        parts.append({"name": "controller", "role": "controller", **control})
        model = next((report.model for report in reports if report.model), "")
        for report in reports:
            if report.role is Role.FRONTEND and report.phase is Phase.SERVING:
                return Endpoints(f"{self._scheme}://{report.http}", report.address, model, parts)
        raise Unreachable("no frontend serves")

    def wait_ready(
        self,
        on_status: Callable[[Status], None] = lambda status: None,
        *,
        seconds: float = READY_SECONDS,
    ) -> Status:
        """Return when every part serves; raises `Unreachable` saying what does not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.status()
            on_status(status)
            if status.ready:
                return status
            if status.hopeless:
                raise Unreachable(f"the cluster did not come up: {status.hopeless}")
            time.sleep(_POLL_SECONDS)  # a poll with a deadline: Ray has no event to wait for
        late = [f"{p.name} {p.phase} {p.detail}".strip() for p in self.status().parts]
        raise Unreachable(f"the cluster was not ready in {seconds:.0f} s: {', '.join(late)}")

    def stop(self) -> None:
        """End all parts in good order; what does not end is ended by Ray and the supervisor."""
        try:
            self._ray.get(self._controller.stop.remote(), timeout=_STOP_SECONDS)
        except self._ray.exceptions.RayError as error:
            raise Unreachable(f"the controller did not end the parts: {error}") from error

    def leave(self) -> None:
        """End all parts and the controller, and leave nothing of them in a Ray that goes on."""
        try:
            self._ray.get(self._controller.clear.remote(), timeout=_STOP_SECONDS)
        except self._ray.exceptions.RayError as error:
            raise Unreachable(f"the controller did not end the parts: {error}") from error
        finally:
            self._ray.kill(self._controller, no_restart=True)


@contextmanager
def running_cluster(config: ClusterConfig) -> Iterator[RunningCluster]:
    """Start the controller on a Ray of our own, or on the one that `config` names; end everything
    on the way out. Does not wait for readiness.
    """
    joins = bool(config.ray_address)
    started = (
        joined_ray(config.ray_address, namespace=config.ray_namespace)
        if joins
        else local_ray(config.run_dir, workers=config.ranks() + config.spare_cpus)
    )
    with started as ray:
        controller = (
            ray.remote(Controller)
            .options(
                name="controller", lifetime="detached", get_if_exists=True, max_restarts=-1,
                num_cpus=0,
            )
            .remote(config)
        )  # fmt: skip
        tls = load_security(config.security).certificate is not None
        cluster = RunningCluster(ray, controller, scheme="https" if tls else "http")
        try:
            yield cluster
        finally:
            # Half-started parts may have nothing to stop; our own Ray ends their processes after.
            with suppress(Unreachable):
                cluster.leave() if joins else cluster.stop()
