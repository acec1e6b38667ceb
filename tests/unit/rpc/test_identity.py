"""The local identity: one user, whatever the caller writes."""

from kvstore.rpc.identity import LocalIdentity, Principal, Role


def test_everyone_is_the_local_user_with_every_role() -> None:
    identity = LocalIdentity()
    plain = identity.identify({}, "unix:uid=0")
    assert plain == Principal("local", "default", frozenset(Role))


def test_nothing_a_caller_writes_widens_it() -> None:
    identity = LocalIdentity("team-a")
    claims = {"authorization": "Bearer root", "kvstore-share-domain": "team-b"}
    assert identity.identify(claims, "ipv4:127.0.0.1:5") == identity.identify({}, "unix:uid=1")
    assert identity.identify(claims, "x").share_domain == "team-a"


def test_a_principal_without_roles_may_nothing_special() -> None:
    assert Principal("worker-1", "default").roles == frozenset()
