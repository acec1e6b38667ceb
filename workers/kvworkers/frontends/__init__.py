"""What users call: gRPC `Inference` and the OpenAI-compatible HTTP server, over one pipeline.

Knows: chat templates, tokens, text, the router, workers' addresses, retries, two wire formats.
Must not know: tensors, pages, arenas, Ray.
"""
