"""Guests in other engines, one folder each, imported only by their hosts.

Knows: an engine's or a gateway's seam. Must not know: the inside of the store beyond
`kvstore.client` and, for those that route, `kvstore.router`.
"""
