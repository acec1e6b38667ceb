"""The HBM tier: pages of the device's pool, who holds them and what they are called.

Knows: references, names, eviction by a policy. Pure: no clock, no tensor, no lock.
Must not know: requests, the cache node, or what a page's bytes are.
"""
