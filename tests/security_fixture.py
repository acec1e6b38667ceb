"""A certificate authority and a `--security` file for a test, with one identity of each kind."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import trustme

from kvstore.rpc.credentials import Credentials
from kvstore.rpc.security import SecurityConfig, load_security
from kvstore.rpc.tokens import digest_of

TOKENS: Mapping[str, str] = {
    name: f"token-of-{name}-0123456789abcdef"
    for name in ("cluster", "team-a", "team-b", "monitor", "operator")
}
ROLES = {
    "cluster": ["frontend", "watch", "peer"],
    "team-a": ["client"],
    "team-b": ["client"],
    "monitor": ["watch"],
    "operator": ["admin"],
}
CERTIFIED = "certified.example"
STRANGER = "stranger.example"


@dataclass(frozen=True)
class Secured:
    """Where everything lies."""

    directory: Path
    file: Path
    audit_log: Path

    @property
    def config(self) -> SecurityConfig:
        return load_security(self.file)

    @property
    def ca(self) -> Path:
        return self.directory / "ca.pem"

    def credentials(self, name: str, *, certificate: str = "server") -> Credentials:
        """Return what the identity `name` shows; "" shows no token, certificate "" none."""
        chain, key = (
            (self.directory / f"{certificate}.{kind}").read_bytes() if certificate else b""
            for kind in ("pem", "key")
        )
        token = TOKENS.get(name, name)
        return Credentials(ca=self.ca.read_bytes(), certificate=chain, key=key, token=token)


def secured(directory: Path, *, mutual: bool = False, **limits: float) -> Secured:
    """Write certificates, the cluster's token and the file into `directory`."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    hosts = ("server", "127.0.0.1", "localhost")
    for name, names in (("server", hosts), (CERTIFIED, (CERTIFIED,)), (STRANGER, (STRANGER,))):
        made = authority.issue_cert(*names, common_name=names[0])
        made.private_key_pem.write_to_path(directory / f"{name}.key")
        (directory / f"{name}.pem").write_bytes(b"".join(p.bytes() for p in made.cert_chain_pems))
    (directory / "cluster.token").write_text(TOKENS["cluster"] + "\n")
    lines = [
        'certificate = "server.pem"\nkey = "server.key"\nca = "ca.pem"',
        f'client_certificates = {json.dumps(mutual)}\ntoken_file = "cluster.token"',
        'audit_log = "audit.jsonl"\n[limits]',
        *(f"{key} = {value}" for key, value in limits.items()),
    ]
    for name, roles in ROLES.items():
        lines.append(
            f'[[identities]]\nname = "{name}"\nshare_domain = "{name}"\nroles = {json.dumps(roles)}'
            f'\ntokens_sha256 = ["{digest_of(TOKENS[name])}"]'
        )
        if mutual and name == "team-a":
            lines.append(f'certificates = ["{CERTIFIED}"]')
    file = directory / "security.toml"
    file.write_text("\n".join(lines) + "\n")
    return Secured(directory, file, directory / "audit.jsonl")
