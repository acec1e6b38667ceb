"""A cluster declared in YAML: one file, one frozen tree, and errors that name the key.

name: default                       workers: {count: 2, pool: 512MiB, threads: 0}
model: path                         nodes: {arena: 1GiB, nvme: dir, nvme_bytes: 100GiB}
ray: {address: auto, …}             frontends: {count: 1, http: host:port, grpc: host:port}
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from kvstore.cli.values import Address, parse_bytes, parse_room
from kvstore.core.errors import BadInput
from kvworkers.cluster.config import ClusterConfig


@dataclass(frozen=True, slots=True)
class Declared:
    """What a file declares. `model` is "" where the default model is meant."""

    name: str
    model: str
    config: ClusterConfig


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is not a text")
    return value


def _size(value: Any) -> int:
    return parse_bytes(str(value)) if not isinstance(value, bool) else _integer(value)


def _room(value: Any) -> int:
    return parse_room(str(value)) if not isinstance(value, bool) else _integer(value)


def _address(value: Any) -> Address:
    return Address.parse(_text(value))


def _quotas(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list of rules")
    return tuple(_text(rule) for rule in value)


Reader = Callable[[Any], Any]

KEYS: Final[Mapping[str, tuple[str, Reader]]] = {
    "name": ("name", _text),
    "model": ("model", _text),
    "listen": ("listen", _text),
    "security": ("security", _text),
    "trace": ("trace", _text),
    "events_redis": ("events_redis", _text),
    "cluster_key": ("cluster_key", _text),
    "control_port": ("control_port", _integer),
    "drain_ms": ("drain_ms", _integer),
    "ray.address": ("ray_address", _text),
    "ray.namespace": ("ray_namespace", _text),
    "ray.spare_cpus": ("spare_cpus", _integer),
    "workers.count": ("workers", _integer),
    "workers.prefill": ("prefill", _integer),
    "workers.decode": ("decode", _integer),
    "workers.pool": ("pool_bytes", _size),
    "workers.threads": ("threads", _integer),
    "workers.tensor_parallel": ("tensor_parallel", _integer),
    "workers.fidelity": ("fidelity", _text),
    "workers.swap": ("swap_bytes", _room),
    "workers.overcommit": ("overcommit", _switch),
    "nodes.arena": ("arena_bytes", _size),
    "nodes.policy": ("policy", _text),
    "nodes.nvme": ("nvme", _text),
    "nodes.nvme_bytes": ("nvme_bytes", _size),
    "nodes.files": ("files", _text),
    "nodes.files_bytes": ("files_bytes", _size),
    "nodes.quotas": ("quotas", _quotas),
    "frontends.count": ("frontends", _integer),
    "frontends.http": ("http", _address),
    "frontends.grpc": ("grpc", _address),
}
"""Key of the file → field of `ClusterConfig` and how it is read."""

FLAGS: Final[Mapping[str, str]] = {
    "--workers": "workers.count", "--prefill": "workers.prefill", "--decode": "workers.decode",
    "--arena": "nodes.arena", "--pool": "workers.pool", "--threads": "workers.threads",
    "--tensor-parallel": "workers.tensor_parallel",
    "--frontends": "frontends.count", "--drain-ms": "drain_ms",
    "--control-port": "control_port", "--ray-namespace": "ray.namespace",
    "--spare": "ray.spare_cpus",
    "--listen": "listen", "--http": "frontends.http", "--grpc": "frontends.grpc",
    "--security": "security", "--nvme-bytes": "nodes.nvme_bytes", "--nvme": "nodes.nvme",
    "--policy": "nodes.policy", "--fidelity": "workers.fidelity",
    "--swap": "workers.swap",
    "--files-bytes": "nodes.files_bytes", "--files": "nodes.files",
    "--cluster-key-file": "cluster_key", "--events-redis": "events_redis",
    "--quota": "nodes.quotas",
}  # fmt: skip
"""What the same value is called on the command line, in the messages of `ClusterConfig`."""

_SECTIONS: Final = frozenset(key.partition(".")[0] for key in KEYS if "." in key)


def load_declared(path: Path) -> Declared:
    """Read and check a file; raises `BadInput` naming the file and the key at fault."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"--config {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"--config {path}: not YAML: {error}") from error
    try:
        return _declared(raw, path.parent)
    except BadInput as error:
        raise BadInput(f"--config {path}: {_by_key(str(error))}") from error


def _declared(raw: Any, base: Path) -> Declared:
    fields: dict[str, Any] = {}
    for key, value in _flat(raw):
        if key not in KEYS:
            raise BadInput(f"{key} is not a key; known are {', '.join(sorted(KEYS))}")
        field, read = KEYS[key]
        try:
            fields[field] = read(value)
        except ValueError as error:
            raise BadInput(f"{key}: {error}") from error
    name, model = fields.pop("name", "default"), fields.pop("model", "")
    for field in ("security", "nvme", "files", "cluster_key"):
        if field in fields:
            fields[field] = base / fields[field]
    if model:
        model = str(base / model)
    config = ClusterConfig(model=Path(model or "."), run_dir=Path("/"), **fields)
    return Declared(name, model, config)


def _flat(raw: Any) -> list[tuple[str, Any]]:
    """Return (dotted key, value) pairs."""
    if not isinstance(raw, dict):
        raise BadInput("the file must hold keys and values")
    found: list[tuple[str, Any]] = []
    for key, value in raw.items():
        if key not in _SECTIONS:
            found.append((str(key), value))
        elif isinstance(value, dict):
            found += [(f"{key}.{inner}", one) for inner, one in value.items()]
        else:
            raise BadInput(f"{key} must hold keys and values")
    return found


def _by_key(message: str) -> str:
    """Return a message of `ClusterConfig` with the file's key in place of the flag."""
    for flag, key in FLAGS.items():
        if message.startswith(flag):
            return key + message[len(flag) :]
    return message
