"""What every `Identity` promises: credentials decide, and nothing else does.

A new implementation joins by one entry in `IDENTITIES`: how to make it, credentials that it
accepts, and credentials that it must refuse (None where it has no such thing).
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.errors import Unauthenticated
from kvstore.rpc.identity import Identity, LocalIdentity, Principal, Role
from kvstore.rpc.security import IdentityEntry
from kvstore.rpc.tokens import KnownIdentities, digest_of

Metadata = Mapping[str, str | bytes]
PEERS = ("unix:", "unix:uid=1000", "ipv4:127.0.0.1:5000", "ipv6:[::1]:5000", "")


@dataclass(frozen=True)
class Case:
    make: Callable[[], Identity]
    accepted: Metadata
    refused: Metadata | None = None


TOKEN = "0123456789abcdef-of-team-a"
TENANT = IdentityEntry(
    name="team-a",
    share_domain="team-a",
    roles=frozenset({Role.CLIENT}),
    tokens_sha256=(digest_of(TOKEN),),
    certificates=("team-a.example",),
)

IDENTITIES = {
    "local": Case(LocalIdentity, {}),
    "local in a domain of its own": Case(lambda: LocalIdentity("team-a"), {}),
    "bearer token": Case(
        lambda: KnownIdentities([TENANT]),
        {"authorization": f"Bearer {TOKEN}"},
        {"authorization": "Bearer somebody-elses-token"},
    ),
    "bearer token as bytes": Case(
        lambda: KnownIdentities([TENANT]), {"authorization": f"bearer {TOKEN}".encode()}, {}
    ),
    "bearer token over a Unix socket": Case(
        lambda: KnownIdentities([TENANT], local_sockets=True),
        {"authorization": f"Bearer {TOKEN}"},
        {"authorization": "Basic dXNlcjpwYXNz"},
    ),
}

CLAIMS = ("kvstore-share-domain", "kvstore-role", "x-forwarded-user", "share-domain", "principal")


@pytest.fixture(params=IDENTITIES)
def case(request: pytest.FixtureRequest) -> Case:
    return IDENTITIES[str(request.param)]


def test_accepted_credentials_give_one_principal(case: Case) -> None:
    identity = case.make()
    first = identity.identify(case.accepted, "unix:")
    assert isinstance(first, Principal)
    assert first.name
    assert first.share_domain, "an empty domain would be shared by everyone without one"
    assert all(isinstance(role, Role) for role in first.roles)
    assert identity.identify(case.accepted, "unix:") == first
    assert case.make().identify(case.accepted, "unix:") == first


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_a_caller_writes_widens_nothing(case: Case, claim: str) -> None:
    identity = case.make()
    honest = identity.identify(case.accepted, "unix:")
    for value in ("admin", "another-domain", b"\xff"):
        assert identity.identify({**case.accepted, claim: value}, "unix:") == honest


@given(
    metadata=st.dictionaries(
        st.text(max_size=20), st.one_of(st.text(max_size=40), st.binary(max_size=40)), max_size=5
    ),
    peer=st.one_of(st.sampled_from(PEERS), st.text(max_size=60)),
)
@pytest.mark.parametrize("name", IDENTITIES)
def test_no_metadata_and_no_peer_crashes_it(
    name: str, metadata: dict[str, str | bytes], peer: str
) -> None:
    identity = IDENTITIES[name].make()
    with contextlib.suppress(Unauthenticated):  # the one way to say no
        assert isinstance(identity.identify(metadata, peer), Principal)


def test_unacceptable_credentials_are_refused(case: Case) -> None:
    if case.refused is None:
        assert isinstance(case.make(), LocalIdentity), "only the local one has nothing to refuse"
        return
    with pytest.raises(Unauthenticated):
        case.make().identify(case.refused, "unix:")


def test_the_local_domain_is_the_configured_one() -> None:
    assert LocalIdentity("team-a").identify({}, "unix:").share_domain == "team-a"
    assert LocalIdentity().identify({}, "unix:").share_domain == "default"


def test_a_certificate_identifies_where_no_token_is_shown() -> None:
    identity = KnownIdentities([TENANT])
    assert identity.identify({}, "ipv4:10.0.0.1:5", ("x", "team-a.example")).name == "team-a"
    with pytest.raises(Unauthenticated):
        identity.identify({}, "ipv4:10.0.0.1:5", ("team-b.example",))
    with pytest.raises(Unauthenticated):  # a wrong token is not mended by a right certificate
        identity.identify({"authorization": "Bearer wrong"}, "ipv4:1:5", ("team-a.example",))


def test_a_unix_socket_is_the_local_users_unless_a_token_says_whose() -> None:
    identity = KnownIdentities([TENANT], local_sockets=True)
    assert identity.identify({}, "unix:") == LocalIdentity().identify({}, "unix:")
    tenant = identity.identify({"authorization": f"Bearer {TOKEN}"}, "unix:")
    assert tenant.share_domain == "team-a"
    assert tenant.roles == frozenset({Role.CLIENT, Role.ARENA})
    with pytest.raises(Unauthenticated):
        identity.identify({}, "ipv4:127.0.0.1:5")
    with pytest.raises(Unauthenticated):
        KnownIdentities([TENANT]).identify({}, "unix:")
