"""LMCache's multiprocess server keeps its objects in our store (L2 adapter `plugin`).

`adapter` is the class that LMCache loads and the only module here that imports it; `objects` does
the work on threads and signals three event descriptors, and `identity` says what a name carries.
Knows nothing of engines or GPUs, and never raises into LMCache for what the cache did.
"""
