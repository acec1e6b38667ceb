"""Errors and status codes: every error has one, and comes back as the class it was."""

import grpc.aio
import pytest
from grpc.aio import AioRpcError, Metadata

from kvstore.core import errors
from kvstore.core.errors import KvStoreError, Refused
from kvstore.rpc.errors import STATUS, error_from, status_of


def _descendants(cls: type[KvStoreError]) -> set[type[KvStoreError]]:
    ours = {c for c in cls.__subclasses__() if c.__module__ == errors.__name__}
    return ours.union(*(_descendants(child) for child in ours))


def _failure(
    code: grpc.StatusCode, message: str | None, trailing: tuple[tuple[str, str | bytes], ...]
) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(*trailing), message, None)


def test_every_error_of_the_tree_has_a_status() -> None:
    assert set(STATUS) == _descendants(KvStoreError)
    assert grpc.StatusCode.OK not in STATUS.values()
    assert grpc.StatusCode.UNKNOWN not in STATUS.values()


@pytest.mark.parametrize("cls", list(STATUS))
def test_the_class_survives_the_wire(cls: type[KvStoreError]) -> None:
    back = error_from(_failure(*status_of(cls("slot 7"))))
    assert type(back) is cls
    assert str(back) == "slot 7"


def test_when_to_retry_survives_the_wire() -> None:
    back = error_from(_failure(*status_of(Refused("full", 250))))
    assert isinstance(back, Refused)
    assert back.retry_after_ms == 250


@pytest.mark.parametrize("value", ["-1", "soon", "", b"\xff", b"17"])
def test_a_strange_retry_hint_is_harmless(value: str | bytes) -> None:
    trailing = (("kvstore-error", "Refused"), ("kvstore-retry-after-ms", value))
    back = error_from(_failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", trailing))
    assert isinstance(back, Refused)
    assert back.retry_after_ms == (17 if value == b"17" else 0)


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.Unreachable),
        (grpc.StatusCode.CANCELLED, errors.Unreachable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Refused),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Unsupported),
        (grpc.StatusCode.OUT_OF_RANGE, errors.TooLarge),
        (grpc.StatusCode.INTERNAL, errors.Unreachable),
    ],
)
def test_peers_that_send_no_class_get_the_closest(
    code: grpc.StatusCode, cls: type[KvStoreError]
) -> None:
    for trailing in ((), (("kvstore-error", "NoSuchClass"),)):
        back = error_from(_failure(code, "words", trailing))
        assert type(back) is cls
        assert str(back) == "words"


def test_a_failure_without_words_still_says_something() -> None:
    assert "UNAVAILABLE" in str(error_from(_failure(grpc.StatusCode.UNAVAILABLE, None, ())))
    assert "without a status" in str(error_from(grpc.RpcError("odd")))
