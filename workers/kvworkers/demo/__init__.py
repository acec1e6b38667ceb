"""The demonstration: clients that hold real conversations, and the proof that nothing changed.

Knows: the public gRPC API, the plain model of `transformers`, terminals.
Must not know: anything inside a worker or a node. It is a user like any other.
"""
