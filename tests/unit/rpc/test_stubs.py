"""The wire: every call of the design is defined, and the generated code belongs to proto/."""

import re
from pathlib import Path

import pytest

from kvstore.core.names import Namespace
from kvstore.rpc.v1 import (
    cache_pb2,
    cache_pb2_grpc,
    cluster_pb2,
    inference_pb2,
    inference_pb2_grpc,
    record_pb2,
    record_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    types_pb2,
    watch_pb2,
    worker_pb2,
    worker_pb2_grpc,
)

PROTO = Path(__file__).resolve().parents[3] / "proto" / "kvstore" / "rpc" / "v1"
SERVICES = {
    "CacheNode": (
        cache_pb2,
        {
            "Acquire", "Clear", "CloseSession", "Get", "Lend", "Lookup", "OpenSession", "Pin",
            "Prefetch", "Put", "ReservePrivate", "Settle", "Stats", "Ticket", "Wait", "Watch",
        },
    ),
    "Worker": (worker_pb2, {"Describe", "Run", "Watch"}),
    "Recorder": (record_pb2, {"Record"}),
    "Cluster": (cluster_pb2, {"Drain", "Restart", "Scale", "Status"}),
    "Router": (router_pb2, {"Complete", "Explain", "Route"}),
    "Inference": (inference_pb2, {"Generate", "ListModels"}),
}  # fmt: skip


@pytest.mark.parametrize("service", SERVICES)
def test_services_define_every_call_of_the_design(service: str) -> None:
    module, methods = SERVICES[service]
    assert set(module.DESCRIPTOR.services_by_name[service].methods_by_name) == methods


def test_generated_classes_are_there() -> None:
    for module, name in (
        (cache_pb2_grpc, "CacheNode"),
        (worker_pb2_grpc, "Worker"),
        (record_pb2_grpc, "Recorder"),
        (router_pb2_grpc, "Router"),
        (inference_pb2_grpc, "Inference"),
    ):
        assert hasattr(module, f"{name}Stub")
        assert hasattr(module, f"{name}Servicer")


def test_the_namespace_on_the_wire_has_our_fields() -> None:
    on_wire = {field.name for field in types_pb2.Namespace.DESCRIPTOR.fields}
    assert on_wire == set(Namespace.__dataclass_fields__)


def test_every_file_declares_our_package() -> None:
    files = sorted(PROTO.glob("*.proto"))
    assert len(files) == 9
    for path in files:
        assert "package kvstore.rpc.v1;" in path.read_text(encoding="utf-8")


def test_lists_of_names_travel_packed() -> None:
    """One allocation instead of n: no repeated bytes field may creep in for names."""
    for path in PROTO.glob("*.proto"):
        assert not re.search(r"repeated bytes (names|tokens)", path.read_text(encoding="utf-8"))
    assert watch_pb2.Events(names=bytes(64)).names == bytes(64)
