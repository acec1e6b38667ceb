"""The controller's decisions against a simulated cluster whose parts die, fail and hang."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from kvworkers.cluster.plan import (
    HUNG_AFTER_MS,
    MAX_FAILED_STARTS,
    MemberList,
    Part,
    Phase,
    Push,
    Report,
    Restart,
    Role,
    Start,
    hopeless,
    next_actions,
    next_members,
    ready,
)

ROLES = {
    "node-0": Role.NODE,
    "worker-0": Role.WORKER,
    "worker-1": Role.WORKER,
    "frontend-0": Role.FRONTEND,
}
ROUND_MS = 250


class SimulatedCluster:
    """Parts as the controller sees them, and as they are."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000
        self.truth = {n: Report(name=n, role=r, phase=Phase.EMPTY) for n, r in ROLES.items()}
        self.parts = {n: Part(name=n, role=r, heard_ms=self.now_ms) for n, r in ROLES.items()}
        self.hung: set[str] = set()
        self.members = MemberList()
        self.incarnations: dict[str, list[int]] = {name: [] for name in ROLES}

    def die(self, name: str) -> None:
        self.truth[name] = Report(name=name, role=ROLES[name], phase=Phase.EMPTY)
        self.parts[name].lose()

    def round(self) -> None:
        """One round of the controller's loop, its actions carried out at once."""
        self.now_ms += ROUND_MS
        for name, part in self.parts.items():
            if name not in self.hung:
                part.hear(self.truth[name], now_ms=self.now_ms)
        self.members = next_members(self.members, self.parts.values())
        for action in next_actions(self.parts, self.members, now_ms=self.now_ms):
            self.parts[action.name].told_ms = self.now_ms
            match action:
                case Start(name, incarnation):
                    self.incarnations[name].append(incarnation)
                    self.truth[name] = replace(
                        self.truth[name],
                        phase=Phase.SERVING,
                        incarnation=incarnation,
                        address=f"127.0.0.1:{incarnation % 60_000}",
                    )
                case Push(name):
                    self.truth[name] = replace(
                        self.truth[name], members_version=self.members.version
                    )
                case Restart(name):
                    self.hung.discard(name)
                    self.parts[name].heard_ms = self.now_ms
                    self.die(name)

    def settle(self) -> int:
        for count in range(HUNG_AFTER_MS // ROUND_MS + 10):
            if ready(self.parts.values(), self.members) and not self.hung:
                return count
            self.round()
        raise AssertionError(f"not ready: {self.parts}")


@given(
    faults=st.lists(
        st.tuples(st.sampled_from(["die", "hang", "round"]), st.sampled_from(sorted(ROLES))),
        max_size=30,
    )
)
def test_every_cluster_comes_back_and_frontends_know_the_truth(
    faults: list[tuple[str, str]],
) -> None:
    cluster = SimulatedCluster()
    for what, name in faults:
        if what == "die":
            cluster.die(name)
        elif what == "hang":
            cluster.hung.add(name)
        else:
            cluster.round()
    cluster.settle()
    served = {report.name: report for report in cluster.members.members}
    truth = {name: replace(report, members_version=0) for name, report in cluster.truth.items()}
    assert served == {n: truth[n] for n, r in ROLES.items() if r is not Role.FRONTEND}
    for given_out in cluster.incarnations.values():
        assert given_out == sorted(set(given_out)), "an incarnation was given twice"


def test_all_parts_start_at_once() -> None:
    cluster = SimulatedCluster()
    cluster.round()
    assert all(cluster.incarnations.values()), "imports and models load while the arena is touched"


def test_a_lost_worker_leaves_the_list_at_once() -> None:
    cluster = SimulatedCluster()
    cluster.settle()
    version = cluster.members.version
    cluster.parts["worker-1"].lose()
    members = next_members(cluster.members, cluster.parts.values())
    assert members.version == version + 1
    assert [report.name for report in members.members] == ["node-0", "worker-0"]
    actions = next_actions(cluster.parts, members, now_ms=cluster.now_ms)
    assert Push("frontend-0") in actions


def test_nodes_learn_the_list_too_and_it_comes_to_rest() -> None:
    cluster = SimulatedCluster()
    cluster.settle()
    cluster.round()
    version = cluster.members.version
    for _ in range(5):
        cluster.round()
    assert cluster.members.version == version
    assert cluster.truth["node-0"].members_version == version


def test_an_unchanged_list_keeps_its_version() -> None:
    cluster = SimulatedCluster()
    cluster.settle()
    assert next_members(cluster.members, cluster.parts.values()) is cluster.members


def test_what_cannot_start_is_given_up_with_its_reason() -> None:
    part = Part(name="worker-0", role=Role.WORKER, heard_ms=0)
    failed = Report(name="worker-0", role=Role.WORKER, phase=Phase.FAILED, detail="no such model")
    for count in range(MAX_FAILED_STARTS):
        assert not hopeless([part])
        part.hear(replace(failed, phase=Phase.STARTING), now_ms=count)
        part.hear(failed, now_ms=count)
        part.hear(failed, now_ms=count)  # the same failure seen twice counts once
    assert hopeless([part]) == "worker-0: no such model"
    assert not next_actions({"worker-0": part}, MemberList(), now_ms=10_000)
