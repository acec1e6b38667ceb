"""A cluster in YAML: a whole one is read, and a wrong one is refused by the key at fault."""

from pathlib import Path

import pytest
from kvworkers.cluster.declared import FLAGS, KEYS, load_declared

from kvstore.cli.values import Address
from kvstore.core.errors import BadInput

WHOLE = """
name: prod
model: models/llama
listen: loopback
drain_ms: 1000
control_port: 7000
ray: {address: auto, namespace: prod, spare_cpus: 1}
workers: {count: 4, pool: 1GiB, threads: 2, prefill: 1, decode: 2, tensor_parallel: 8}
nodes: {arena: 64GiB, policy: lru, nvme: cache, nvme_bytes: 1TiB, quotas: ["domain:a:dram=1GiB"]}
frontends: {count: 2, http: "127.0.0.1:8000", grpc: "127.0.0.1:9000"}
"""


def written(directory: Path, text: str) -> Path:
    path = directory / "cluster.yaml"
    path.write_text(text)
    return path


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    declared = load_declared(written(tmp_path, WHOLE))
    config = declared.config
    assert (declared.name, declared.model) == ("prod", str(tmp_path / "models/llama"))
    assert (config.workers, config.pool_bytes, config.threads) == (4, 1 << 30, 2)
    assert config.tensor_parallel == 8
    assert (config.arena_bytes, config.nvme, config.nvme_bytes) == (
        64 << 30, tmp_path / "cache", 1 << 40,
    )  # fmt: skip
    assert (config.prefill, config.decode) == (1, 2)
    assert config.quotas == ("domain:a:dram=1GiB",)
    assert (config.ray_address, config.ray_namespace) == ("auto", "prod")
    assert config.frontend_address(config.http, 1) == Address("127.0.0.1", 8001)
    assert type(config).from_json(config.to_json()) == config


def test_no_room_for_requests_that_make_way_is_a_choice(tmp_path: Path) -> None:
    assert load_declared(written(tmp_path, "workers: {swap: 0}")).config.swap_bytes == 0
    assert load_declared(written(tmp_path, "{}")).config.swap_bytes is None


def test_an_empty_tree_is_the_default_cluster(tmp_path: Path) -> None:
    declared = load_declared(written(tmp_path, "{}"))
    assert (declared.name, declared.model, declared.config.workers) == ("default", "", 2)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("worker: {count: 1}", "worker is not a key"),
        ("workers: {size: 1}", "workers.size is not a key"),
        ("workers: 3", "workers must hold keys"),
        ("workers: {count: two}", "workers.count: 'two' is not a whole number"),
        ("workers: {count: true}", "workers.count: True"),
        ("workers: {count: 0}", "workers.count 0: must lie in"),
        ("workers: {tensor_parallel: 0}", "workers.tensor_parallel 0: must lie in"),
        ("workers: {prefill: 2}", "workers.prefill 2: none of the workers"),
        ("workers: {decode: 3}", "workers.decode 3: must lie in"),
        ("workers: {swap: -1}", "workers.swap: '-1' is not a size"),
        ("workers: {overcommit: 1}", "workers.overcommit: 1 is not true or false"),
        ("nodes: {arena: 1}", "nodes.arena 1: at least"),
        ("nodes: {arena: much}", "nodes.arena: 'much' is not a size"),
        ("frontends: {count: 0}", "frontends.count 0: one per host"),
        ("frontends: {count: 65}", "frontends.count 65"),
        ("frontends: {http: here}", "frontends.http: 'here' is not HOST:PORT"),
        ('frontends: {http: "0.0.0.0:80"}', "frontends.http '0.0.0.0:80' is not a loopback"),
        ('frontends: {count: 2, http: "127.0.0.1:65535"}', "frontends.http 127.0.0.1:65535"),
        ("listen: everywhere", "listen 'everywhere'"),
        ("listen: host", "listen host:"),
        ("security: gone.toml", "gone.toml: No such file"),
        ("drain_ms: -1", "drain_ms -1"),
        ("ray: {namespace: a b}", "ray.namespace 'a b'"),
        ("[1, 2]", "must hold keys and values"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_its_key(tmp_path: Path, text: str, named: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(BadInput) as refused:
        load_declared(path)
    assert named in str(refused.value)
    assert str(path) in str(refused.value)


def test_every_flag_stands_for_a_key() -> None:
    assert set(FLAGS.values()) <= set(KEYS)


def test_flags_and_the_file_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvstore.cli.main import run

    assert run(["up", "--config", str(written(tmp_path, "{}")), "--workers", "3"]) == 2
    assert "--workers and --config exclude each other" in capsys.readouterr().err
    assert run(["up", "--config", str(tmp_path / "none.yaml")]) == 2
    assert run(["up", "--address", "auto"]) == 2
    assert "name them in --http and --grpc" in capsys.readouterr().err


def test_a_wrong_quota_is_refused_by_its_key(tmp_path: Path) -> None:
    path = written(tmp_path, 'nodes: {quotas: ["domain:a:hbm=1GiB"]}')
    with pytest.raises(BadInput, match=r"nodes.quotas .*'hbm' is not one of"):
        load_declared(path)
