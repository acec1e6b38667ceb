"""Continuous batching: sequences, the scheduler that decides, the engine that does.

Knows: pages, the model's step, the cache node through `kvstore.client`.
Must not know: gRPC handlers, Ray, text.
"""
