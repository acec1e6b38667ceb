"""What a controller remembers: names are stable, free ones are taken again, nothing is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvworkers.cluster.orders import Orders, Seat

from kvstore.core.errors import BadInput, NotFound

HOSTS = st.frozensets(st.sampled_from("abcdefgh"))


def test_hosts_keep_their_names_and_dead_ones_free_theirs() -> None:
    orders = Orders().with_hosts({"b", "a"})
    assert orders.hosts == {"a": "node-0", "b": "node-1"}
    orders = orders.with_hosts({"b", "c"})
    assert orders.hosts == {"b": "node-1", "c": "node-0"}


def test_a_drained_host_gets_no_node_again_until_it_has_left() -> None:
    orders = Orders().with_hosts({"a", "b"}).without_host("node-0")
    assert orders.with_hosts({"a", "b"}).hosts == {"b": "node-1"}
    assert orders.with_hosts({"a", "b", "c"}).hosts["c"] == "node-2", "its name is still taken"
    assert orders.with_hosts({"b"}).with_hosts({"a", "b"}).hosts == {"a": "node-0", "b": "node-1"}


def test_the_last_host_and_an_unknown_one_cannot_be_drained() -> None:
    orders = Orders().with_hosts({"a"})
    with pytest.raises(BadInput, match="only node"):
        orders.without_host("node-0")
    with pytest.raises(NotFound, match=r"node-9.*node-0"):
        orders.without_host("node-9")


def test_workers_come_in_groups_and_leave_from_the_end() -> None:
    orders = Orders().with_workers("workers", 2).with_workers("workers-0", 9)
    assert orders.workers["worker-1"] == Seat("workers", 1)
    assert orders.workers["worker-2"] == Seat("workers-0", 0)
    assert orders.last_workers(2) == ["worker-10", "worker-9"]
    fewer = orders.without_workers([f"worker-{number}" for number in range(2, 11)])
    assert fewer.groups() == {"workers"}
    assert set(fewer.with_workers("more", 1).workers) == {"worker-0", "worker-1", "worker-2"}


@given(looks=st.lists(HOSTS, max_size=8), workers=st.integers(0, 5))
def test_names_are_unique_and_the_way_to_json_loses_nothing(
    looks: list[frozenset[str]], workers: int
) -> None:
    orders = Orders().with_workers("workers", workers)
    for alive in looks:
        before = dict(orders.hosts)
        orders = orders.with_hosts(alive)
        assert set(orders.hosts) == set(alive)
        assert len(set(orders.hosts.values())) == len(orders.hosts)
        assert all(orders.hosts[host] == before[host] for host in alive if host in before)
    assert Orders.from_json(orders.to_json()) == orders
