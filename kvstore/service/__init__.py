"""The keeper and the cache node: one pair of processes per host.

Knows: sessions, leases, reservations, sealing, restart under the keeper, the gRPC service.
Must not know: models, tokens, tensors, Ray.
"""
