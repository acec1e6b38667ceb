"""Times and bounds of what one node keeps."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """Times and bounds of one arena."""

    lease_ms: int = 30_000
    claim_ms: int = 5_000
    """How long a reservation keeps others from computing the same block."""
    reserve_quota_bytes: int
    """Bytes one session may have reserved and not settled."""
    private_quota_bytes: int = 0
    """Bytes that all sessions together may hold in private slots."""
