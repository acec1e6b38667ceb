"""A KV-cache service for LLM serving: computed prefixes, given back faster than recomputing.

The public surface is `Client`, `AsyncClient`, the nouns they use and the errors they raise.
"""
