"""The HTTP server that OpenAI's clients talk to: a file for each endpoint.

Knows: OpenAI's wire formats, server-sent events, status codes.
Must not know: where a request runs, how it is retried, gRPC.
"""
