"""`kvstore bench kernels`: kernels on this machine's GPU, each checked before it is timed.

Knows: cells to measure, CUDA events and graphs. Must not know: workers, the store, Ray.
"""
