"""Chooses the worker with the least work left, from a view that may be wrong.

Knows: scores (pure), bookings, event sources, retries. Must not know: tokenizers, tensors, Ray.
"""
