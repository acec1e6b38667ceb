"""Attention and movement over paged KV in the one layout.

Knows: torch and Triton, and `kvstore.core.layout`. Must not know: requests, workers, Ray.
"""
