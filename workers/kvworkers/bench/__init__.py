"""`kvstore bench worker`: the engine beside its own recompute and the device's limits.

Knows: engine, pages, stream, models, and a real node started as a process. Must not know: Ray,
frontends, routers.
"""
