"""Token buckets per share domain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.errors import Refused
from kvstore.rpc.rate import MAX_DOMAINS, RateLimiter
from kvstore.rpc.security import Rate


def admitted(limiter: RateLimiter, domain: str, now_s: float) -> bool:
    try:
        limiter.admit(domain, now_s)
    except Refused:
        return False
    return True


def test_a_burst_passes_and_then_the_rate() -> None:
    limiter = RateLimiter(Rate(calls_per_s=10, burst=5))
    assert [admitted(limiter, "a", 0.0) for _ in range(7)] == [True] * 5 + [False] * 2
    with pytest.raises(Refused) as refused:
        limiter.admit("a", 0.0)
    assert 1 <= refused.value.retry_after_ms <= 100
    assert admitted(limiter, "a", 0.11)
    assert not admitted(limiter, "a", 0.11)
    assert admitted(limiter, "b", 0.11), "one domain's calls are not another's"


def test_a_large_body_is_paid_off_before_the_next_call() -> None:
    limiter = RateLimiter(Rate(bytes_per_s=1_000))
    limiter.admit("a", 0.0)
    limiter.charge("a", 5_000, 0.0)
    with pytest.raises(Refused) as refused:
        limiter.admit("a", 1.0)
    assert 1_900 <= refused.value.retry_after_ms <= 2_100
    assert admitted(limiter, "a", 3.1)


def test_no_rate_is_no_bound_and_a_domain_may_have_its_own() -> None:
    limiter = RateLimiter(Rate(), {"small": Rate(calls_per_s=1, burst=1)})
    assert all(admitted(limiter, "a", 0.0) for _ in range(1_000))
    assert [admitted(limiter, "small", 0.0) for _ in range(2)] == [True, False]


def test_the_number_of_domains_is_bounded() -> None:
    limiter = RateLimiter(Rate(calls_per_s=1))
    for number in range(MAX_DOMAINS + 10):
        limiter.admit(str(number), 0.0)
    assert len(limiter._buckets) == MAX_DOMAINS


@given(
    times=st.lists(st.floats(0, 100), min_size=1, max_size=200),
    rate=st.floats(0.1, 50),
    burst=st.floats(1, 20),
)
def test_never_more_than_burst_and_rate_allow(
    times: list[float], rate: float, burst: float
) -> None:
    limiter = RateLimiter(Rate(calls_per_s=rate, burst=burst))
    passed = sum(admitted(limiter, "a", now_s) for now_s in sorted(times))
    assert passed <= burst + rate * (max(times) - min(times)) + 1 + 1e-6
