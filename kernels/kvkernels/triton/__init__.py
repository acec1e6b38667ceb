"""Triton kernels over pages, and the module that serves CUDA tensors with them.

Knows: torch, Triton and the shape of pages. Must not know: requests, workers, Ray. `device` is
what `ops.implementation("cuda")` returns; everything else here is reached through it.
"""
