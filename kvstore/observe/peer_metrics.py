"""Metric families of a node's dealings with those who do not map its arena."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class PeerMetrics:
    """What a cache node gives to and takes from those who do not map its arena."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.connections = Counter(
            "kvstore_bulk_connections",
            "Connections of the bulk port, by how they ended",
            ["how"],
            registry=registry,
        )
        self.bytes = Counter(
            "kvstore_bulk_bytes",
            "Bytes on tickets that the bulk port has redeemed",
            ["direction"],
            registry=registry,
        )
        self.tickets = Gauge("kvstore_bulk_tickets", "Tickets not used yet", registry=registry)
        self.remote_sessions = Gauge(
            "kvstore_remote_sessions", "Open sessions of remote clients", registry=registry
        )
        self.peers = Gauge(
            "kvstore_peers", "Neighbours by how they fare", ["state"], registry=registry
        )
        self.known_blocks = Gauge(
            "kvstore_peer_known_blocks", "Blocks known to lie at neighbours", registry=registry
        )
        self.resyncs = Counter(
            "kvstore_peer_resyncs",
            "Streams of neighbours followed anew",
            ["reason"],
            registry=registry,
        )
        self.list_errors = Counter(
            "kvstore_peer_list_errors",
            "Times that the list of peers could not be read",
            registry=registry,
        )
