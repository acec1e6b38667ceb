"""Parts for testing the store and what plugs into it; importable by users.

Knows: how to run a node for a test and how to break things on purpose.
Must not know: any host engine.
"""
