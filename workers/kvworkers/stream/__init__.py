"""Movement between the host's arena and the device's pages.

Knows: tensors, memory of the arena, one thread for copies.
Must not know: names, leases, requests; it copies what it is told, between places it is told.
"""
