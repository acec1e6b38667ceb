import pytest

from kvstore.core.errors import BadInput, TooLarge
from kvstore.router.members import MAX_MEMBERS, Change, Member, Members, parse_member

WORKER = Member("worker", "w", "127.0.0.1:1", "h", 1)
NODE = Member("node", "n", "unix:/tmp/n", "h", 1)


def test_lists_by_kind_in_the_order_given() -> None:
    members = Members.of([WORKER, NODE])
    assert (members.workers(), members.nodes(), len(members)) == ([WORKER], [NODE], 2)


def test_a_restarted_member_is_gone_and_new() -> None:
    restarted = Member("worker", "w", "127.0.0.1:2", "h", 2)
    change = Members.of([WORKER, NODE]).change_to(Members.of([restarted, NODE]))
    assert change == Change(gone=(WORKER,), new=(restarted,))
    assert Members.of([NODE]).change_to(Members.of([NODE])) == Change((), ())


def test_bad_lists_are_refused() -> None:
    with pytest.raises(BadInput, match="two members are called w"):
        Members.of([WORKER, WORKER])
    many = [Member("worker", str(number), "h:1") for number in range(MAX_MEMBERS + 1)]
    with pytest.raises(TooLarge):
        Members.of(many)


@pytest.mark.parametrize(
    ("kind", "name", "address"),
    [
        ("frontend", "x", "a:1"),
        ("worker", "", "a:1"),
        ("worker", "x" * 257, "a:1"),
        ("node", "x", ""),
    ],
)
def test_bad_members_are_refused(kind: str, name: str, address: str) -> None:
    with pytest.raises(BadInput):
        Member(kind, name, address)  # type: ignore[arg-type]


def test_flags_are_parsed() -> None:
    assert parse_member("worker", "w=127.0.0.1:1@h") == Member("worker", "w", "127.0.0.1:1", "h")
    assert parse_member("node", "unix:/tmp/x", default_name="node-0") == (
        Member("node", "node-0", "unix:/tmp/x")
    )
    for text in ("127.0.0.1:1", "w=nothing", "=127.0.0.1:1"):
        with pytest.raises(BadInput, match="is not NAME=HOST:PORT"):
            parse_member("worker", text)
