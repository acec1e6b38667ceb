"""Bounds that hold everywhere. Each is a number with its reason, not a tunable."""

BLOCK_TOKENS = 16
"""Tokens in a block (DESIGN D1): one page of paged attention, one object in every tier."""

NAME_BYTES = 32
"""A block name or a root: one SHA-256 digest."""

GRANULE_BYTES = 4096
"""Unit of placement in an arena: the alignment that O_DIRECT and DMA both want."""

MAX_NAMES_PER_CALL = 65_536
"""Names in one RPC: 1 M tokens, 2 MiB packed, inside `MAX_MESSAGE_BYTES`."""

MAX_PROMPT_TOKENS = MAX_NAMES_PER_CALL * BLOCK_TOKENS
"""Tokens in one prompt, so that its names fit one call."""

MAX_MESSAGE_BYTES = 8 << 20
"""A gRPC message. Control only, never bulk bytes, so 8 MiB is generous."""

MAX_BLOCK_BYTES = 64 << 20
"""A block object; 70B-class models in bf16 have 5 MiB, some 20."""

MAX_EXTRA_KEY_BYTES = 4096
"""One extra key of a block name (image digest, salt)."""

MAX_SHARES = 1024
"""Shares (KV heads) in a block."""

MAX_ID_BYTES = 256
"""A session, request, domain or model identifier."""

MAX_GRAMMAR_BYTES = 256 << 10
"""The text of a grammar that a reply follows; schemas of a few dozen tools have some ten KiB."""

MAX_DEADLINE_MS = 600_000
"""A deadline a caller may ask for; longer waits are a mistake in units."""

SUSPECT_AFTER_MS = 1_000
"""A publisher silent this long is suspect and nothing is routed to it (DESIGN §5)."""

MARK_PERIOD_MS = 250
"""Period of `Watch` marks: heartbeat and digest (DESIGN §5)."""
