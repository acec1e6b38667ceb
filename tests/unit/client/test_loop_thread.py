"""The thread under a blocking client, at its end."""

import pytest

from kvstore.client.blocking import _LoopThread


def test_work_for_a_loop_that_ended_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    thread, done = _LoopThread(), list[int]()
    thread.stop()
    thread.soon(lambda: done.append(1))
    # As seen between the loop's end and its thread's.
    monkeypatch.setattr(_LoopThread, "alive", True)
    thread.soon(lambda: done.append(2))
    assert not done
