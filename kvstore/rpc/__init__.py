"""What processes say to each other, and the glue around it.

Knows: the generated messages (`v1`), channels and servers with our bounds, identity, and the one
mapping between errors and status codes. Must not know: tiers, policies, or what a call does.
"""
