"""An endpoint picker for Envoy and gateways like it: external processing over our router.

Knows: the protocol of the gateway API's inference extension. Must not know: how a choice is made.
"""
