"""Brings a cluster up from the driver's side, watches it, and ends it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import grpc

from kvstore.core.errors import Unreachable
from kvstore.rpc.errors import error_from
from kvstore.rpc.v1 import inference_pb2, inference_pb2_grpc
from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.controller import Controller, Status
from kvworkers.cluster.plan import Phase, Report, Role
from kvworkers.cluster.ray_runtime import local_ray

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

    def __init__(self, ray: Any, controller: Any) -> None:
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
        parts.append({"name": "controller", "role": "controller", "metrics": status.metrics})
        for report in reports:
            if report.role is Role.FRONTEND and report.phase is Phase.SERVING:
                model = _served_model(report.address)
                return Endpoints(f"http://{report.http}", report.address, model, parts)
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


def _served_model(address: str) -> str:
    """Ask a frontend what it calls its model."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        try:
            listed = stub.ListModels(inference_pb2.ListModelsRequest(), timeout=_STATUS_SECONDS)
        except grpc.RpcError as failure:
            raise error_from(failure) from failure
    return str(listed.models[0].id) if listed.models else ""


@contextmanager
def running_cluster(config: ClusterConfig) -> Iterator[RunningCluster]:
    """Start Ray and the controller; on the way out end everything. Does not wait for readiness."""
    with local_ray(config.run_dir, workers=config.workers) as ray:
        controller = (
            ray.remote(Controller)
            .options(name="controller", lifetime="detached", max_restarts=-1, num_cpus=0)
            .remote(config)
        )
        cluster = RunningCluster(ray, controller)
        try:
            yield cluster
        finally:
            # Half-started parts may have nothing to stop; Ray ends their processes after this.
            with suppress(Unreachable):
                cluster.stop()
