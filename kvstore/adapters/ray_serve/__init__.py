"""Our router as the `request_router` of a Ray Serve deployment.

Knows: Ray Serve's request router seam, imported by `request_router` alone. Must not know: how a
choice is made.
"""
