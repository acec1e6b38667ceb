"""What a `--security` file may say, and where a port may listen."""

from pathlib import Path

import pytest

from kvstore.core.errors import BadInput
from kvstore.rpc.credentials import Credentials, server_credentials, ssl_context
from kvstore.rpc.identity import Role
from kvstore.rpc.security import (
    SecurityConfig,
    check_listen,
    check_metrics,
    is_loopback,
    load_security,
)
from tests.security_fixture import TOKENS, secured

DIGEST = "a" * 64
IDENTITY = (
    '[[identities]]\nname = "a"\nshare_domain = "a"\nroles = ["client"]\n'
    f'tokens_sha256 = ["{DIGEST}"]\n'
)


def written(directory: Path, text: str) -> Path:
    path = directory / "security.toml"
    path.write_text(text)
    return path


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    config = secured(tmp_path, mutual=True, calls_per_s=5, bytes_per_s=1e6).config
    assert config.authenticates and config.client_certificates
    assert config.certificate == tmp_path / "server.pem"
    assert config.limits.calls_per_s == 5
    roles = {entry.name: entry.roles for entry in config.identities}
    assert roles["cluster"] == {Role.FRONTEND, Role.WATCH, Role.PEER}
    assert config.token() == TOKENS["cluster"]
    assert server_credentials(config) is not None
    assert ssl_context(config) is not None
    assert load_security(None) == SecurityConfig()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nonsense = 1", "nonsense is not a key"),
        ("certificate = 1", "certificate must be a str"),
        ('certificate = "gone.pem"\nkey = "gone.key"', "certificate: "),
        ('key = "security.toml"', "certificate and key belong together"),
        ("client_certificates = true", "client_certificates needs ca"),
        ('token_file = "security.toml"', "token_file needs ca"),
        ("[limits]\ncalls_per_s = -1", "limits.calls_per_s"),
        ("[limits]\ncalls_per_s = nan", "limits.calls_per_s"),
        ("[limits]\nper_minute = 1", "limits.per_minute is not a key"),
        ("[[identities]]\nroles = []", "identities[0].name is missing"),
        (IDENTITY.replace('["client"]', '["root"]'), "identities[0].roles: 'root' is none of"),
        (IDENTITY.replace(DIGEST, "A" * 64), "identities[0].tokens_sha256[0]"),
        (IDENTITY.replace(f'"{DIGEST}"', ""), "identities[0].give tokens_sha256"),
        (IDENTITY.replace('share_domain = "a"', 'share_domain = ""'), "share_domain must have"),
        (IDENTITY + IDENTITY, "share a credential"),
        (IDENTITY + IDENTITY.replace('name = "a"', 'name = "b"'), "share a credential"),
        (IDENTITY + 'certificates = ["x"]', "client_certificates is off"),
        ("= 1", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_the_key_at_fault(tmp_path: Path, text: str, named: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(BadInput) as refused:
        load_security(path)
    assert named in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere"):
        load_security(tmp_path / "nowhere")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:80", "[::1]:80", "127.9.9.9:1"])
def test_loopback_needs_nothing(address: str) -> None:
    check_listen("--listen", address, SecurityConfig())
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "127.evil.example:1"])
def test_beyond_loopback_needs_identities_and_tls_or_the_word(tmp_path: Path, address: str) -> None:
    with pytest.raises(BadInput, match="insecure_listen"):
        check_listen("--listen", address, SecurityConfig())
    named = load_security(written(tmp_path, IDENTITY))
    with pytest.raises(BadInput, match="in the clear"):
        check_listen("--listen", address, named)
    check_listen("--listen", address, SecurityConfig(insecure_listen=True))
    (tmp_path / "s").mkdir()
    safe = secured(tmp_path / "s").config
    check_listen("--listen", address, safe)
    with pytest.raises(BadInput, match="client_certificates"):
        check_metrics("--metrics", address, safe)
    (tmp_path / "m").mkdir()
    check_metrics("--metrics", address, secured(tmp_path / "m", mutual=True).config)


@pytest.mark.parametrize("address", ["", "x", "host:", ":1", "1.2.3.4:99999", "1.2.3.4:²"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(BadInput, match="is not host:port"):
        check_listen("--listen", address, SecurityConfig(insecure_listen=True))


@pytest.mark.parametrize("text", ["", "short", "x" * 2_000, "kein-ASCII-schlüssel"])
def test_a_token_has_to_be_one(tmp_path: Path, text: str) -> None:
    made = secured(tmp_path)
    (tmp_path / "cluster.token").write_text(text)
    with pytest.raises(BadInput, match="token_file") as refused:
        made.config.token()
    assert not text or text not in str(refused.value)


def test_nothing_prints_a_secret(tmp_path: Path) -> None:
    made = secured(tmp_path)
    credentials = Credentials.from_file(made.file)
    assert credentials.token == TOKENS["cluster"]
    shown = f"{credentials!r} {credentials} {made.config!r}"
    assert TOKENS["cluster"] not in shown
    assert "PRIVATE KEY" not in shown
    for entry in made.config.identities:
        assert not any(digest in shown for digest in entry.tokens_sha256)


def test_unusable_material_is_named(tmp_path: Path) -> None:
    made = secured(tmp_path)
    (tmp_path / "server.key").write_text("no key")
    with pytest.raises(BadInput, match="certificate, key or ca"):
        ssl_context(made.config)


def test_the_example_of_the_page_is_a_sound_file(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "security.md"
    text = page.read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]
    for name in ("host.pem", "host.key", "ca.pem", "cluster.token"):
        (tmp_path / name).write_text(TOKENS["cluster"])
    config = load_security(written(tmp_path, text))
    assert [entry.name for entry in config.identities] == ["cluster", "team-a"]
    assert config.limits.calls_per_s == 50
    for role in Role:
        assert f"| `{role}` |" in page.read_text(encoding="utf-8")
