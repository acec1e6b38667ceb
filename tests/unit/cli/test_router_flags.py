"""What `kvstore router` refuses before it starts; that it serves is shown over gRPC."""

import pytest

from kvstore.cli.main import run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weight", "paying"], "'paying' is not DOMAIN=WEIGHT"),
        (["--weight", "paying=0"], "weight of domain paying is 0.0"),
        (["--hold-ms", "0"], "hold-ms"),
        (["--max-waiting", "0"], "max-waiting"),
    ],
)
def test_bad_flags_are_wrong_usage(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["router", "--worker", "127.0.0.1:1", *flags]) == 2
    assert message in capsys.readouterr().err
