"""Sizes and addresses as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.cli.values import Address, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("512MiB", 512 << 20),
        ("1.5g", 3 << 29),
        (" 2 GB ", 2_000_000_000),
        ("1t", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "MiB", "1 parsec", "1e9", "1_000", "٣", "nan", "9" * 400]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@given(st.integers(1, 1 << 50))
def test_a_plain_number_means_bytes(size: int) -> None:
    assert parse_bytes(str(size)) == size


def test_sizes_for_people() -> None:
    assert format_bytes(12) == "12 B"
    assert format_bytes(512 << 20) == "512.0 MiB"
    assert format_bytes(3 << 41) == "6.0 TiB"


def test_addresses() -> None:
    assert Address.parse("127.0.0.1:0") == Address("127.0.0.1", 0)
    assert str(Address.parse("[::1]:80")) == "[::1]:80"


@pytest.mark.parametrize("text", ["", "8000", ":80", "host:", "host:http", "host:65536", "h:-1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Address.parse(text)
