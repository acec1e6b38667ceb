"""kvstore: every prompt prefix that any GPU of the cluster computed, given back faster than recomputing.

The public surface is `Client`, `AsyncClient`, the nouns they use and the errors they raise.
"""
