"""The HTTP server that OpenAI's clients talk to: one file for each endpoint, one for what they share.

Knows: OpenAI's wire formats, server-sent events, status codes.
Must not know: where a request runs, how it is retried, gRPC.
"""
