"""The door: every method has a role, and the table is the whole of it."""

import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from kvstore.core.errors import Forbidden, Refused, Unauthenticated
from kvstore.rpc.envoy import ext_proc_pb2
from kvstore.rpc.gate import OPEN_PREFIX, REQUIRED, Gate, gate_of, metadata_of
from kvstore.rpc.identity import Principal, Role
from kvstore.rpc.v1 import (
    cache_pb2,
    cluster_pb2,
    inference_pb2,
    inspect_pb2,
    record_pb2,
    router_pb2,
    worker_pb2,
)
from tests.security_fixture import TOKENS, secured

FILES = (
    cache_pb2, cluster_pb2, ext_proc_pb2, inference_pb2, inspect_pb2, record_pb2, router_pb2,
    worker_pb2,
)  # fmt: skip
CLEAR = "/kvstore.rpc.v1.CacheNode/Clear"


class Call:
    """What a gate sees of a call."""

    def __init__(self, token: str = "", peer: str = "ipv4:10.0.0.9:1") -> None:
        self._token = token
        self._peer = peer

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self._token}"),) if self._token else ()

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


def enter(gate: Gate, method: str, call: Call, size: int = 0) -> None:
    with gate.admitted(method, call, size):  # type: ignore[arg-type]
        pass


def test_every_method_of_every_service_has_a_role() -> None:
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == set(REQUIRED)
    assert len(methods) > 20


@pytest.mark.parametrize("method", sorted(REQUIRED))
def test_only_who_has_the_role_gets_in(tmp_path: Path, method: str) -> None:
    gate = gate_of(secured(tmp_path).config, CollectorRegistry())
    roles = {
        name: Role(role)
        for name, role in (("team-a", "client"), ("monitor", "watch"), ("operator", "admin"))
    }
    for name, role in roles.items():
        if REQUIRED[method] is role:
            enter(gate, method, Call(TOKENS[name]))
        else:
            with pytest.raises(Forbidden):
                enter(gate, method, Call(TOKENS[name]))
    for token in ("", "wrong-token-0123456789"):
        with pytest.raises(Unauthenticated):
            enter(gate, method, Call(token))


def test_probes_come_in_and_unknown_methods_do_not(tmp_path: Path) -> None:
    gate = gate_of(secured(tmp_path).config, CollectorRegistry())
    enter(gate, OPEN_PREFIX + "Check", Call())
    for name in TOKENS:
        with pytest.raises(Forbidden):
            enter(gate, "/kvstore.rpc.v1.CacheNode/New", Call(TOKENS[name]))


def test_a_domain_over_its_rate_is_refused_and_the_cluster_is_not(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    gate = gate_of(secured(tmp_path, calls_per_s=0.001, burst=2).config, registry)
    generate, run = "/kvstore.rpc.v1.Inference/Generate", "/kvstore.rpc.v1.Worker/Run"
    enter(gate, generate, Call(TOKENS["team-a"]))
    enter(gate, generate, Call(TOKENS["team-a"]), size=1)
    with pytest.raises(Refused):
        enter(gate, generate, Call(TOKENS["team-a"]))
    enter(gate, generate, Call(TOKENS["team-b"]))
    for _ in range(5):
        enter(gate, run, Call(TOKENS["cluster"]))
    denied = registry.get_sample_value("kvstore_access_denied_total", {"reason": "Refused"})
    assert denied == 1


def test_each_admin_call_leaves_one_line_and_no_secret(tmp_path: Path) -> None:
    made = secured(tmp_path)
    gate = gate_of(made.config, CollectorRegistry())
    enter(gate, CLEAR, Call(TOKENS["operator"]))
    with pytest.raises(Forbidden):
        enter(gate, CLEAR, Call(TOKENS["team-a"]))
    with pytest.raises(Unauthenticated):
        enter(gate, CLEAR, Call("stolen-token-0123456789"))
    with pytest.raises(ZeroDivisionError), gate.admitted(CLEAR, Call(TOKENS["operator"]), 0):  # type: ignore[arg-type]
        raise ZeroDivisionError
    enter(gate, "/kvstore.rpc.v1.CacheNode/Stats", Call(TOKENS["monitor"]))
    text = made.audit_log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["principal"], line["outcome"]) for line in lines] == [
        ("operator", "ok"),
        ("team-a", "Forbidden"),
        ("", "Unauthenticated"),
        ("operator", "failed"),
    ]
    assert all(line["method"] == CLEAR and line["peer"] for line in lines)
    assert "token" not in text
    assert made.audit_log.stat().st_mode & 0o077 == 0


def test_without_identities_everyone_is_the_local_user() -> None:
    from kvstore.rpc.security import SecurityConfig

    gate = gate_of(SecurityConfig(), CollectorRegistry())
    for method in REQUIRED:
        enter(gate, method, Call())
    principal = gate.admit(Role.ADMIN, lambda: Principal("x", "d", frozenset({Role.ADMIN})))
    assert principal.share_domain == "d"


def test_keys_of_absurd_length_are_not_looked_at() -> None:
    class Keyed(Call):
        def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
            return ("good", "1"), ("x" * 1_000, "2")

    assert metadata_of(Keyed()) == {"good": "1"}  # type: ignore[arg-type]
    assert metadata_of(Call()) == {}  # type: ignore[arg-type]
