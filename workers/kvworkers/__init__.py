"""The serving side: Ray actors that pin devices, continuous batching, frontends.

Knows: torch, transformers, Ray, and `kvstore` through its client. Must not be known by `kvstore`.
"""
