"""What workers, adapters and users call: `AsyncClient` and `Client`.

Knows: sessions, Acquire and Settle, how to read a slot safely.
Must not know: how a node decides; tensors; engines.
"""
