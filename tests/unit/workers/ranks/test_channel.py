import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from kvworkers.ranks.channel import Channel
from kvworkers.ranks.messages import LENGTHS, Frame, Kind

from kvstore.core.errors import BadInput, Unreachable
from tests.patience import PATIENCE_S


def pair(deadline_s: float = PATIENCE_S) -> tuple[Channel, Channel]:
    one, other = socket.socketpair()
    return Channel(one, deadline_s=deadline_s), Channel(other, deadline_s=deadline_s)


def test_frames_arrive_whole_in_order_from_many_threads() -> None:
    one, other = pair()
    array = np.arange(100_000)

    def send(number: int) -> None:
        one.send(Frame(Kind.MOVED, {"job": number, "error": ""}, {"a": array + number}))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    frames = [other.receive(deadline_s=PATIENCE_S)[0] for _ in threads]
    for thread in threads:
        thread.join()
    assert sorted(frame.number("job") for frame in frames) == [0, 1, 2, 3]
    assert all((f.arrays["a"] == array + f.number("job")).all() for f in frames)
    one.close()
    other.close()


def test_a_descriptor_comes_with_its_frame(tmp_path: Path) -> None:
    one, other = pair()
    with (tmp_path / "file").open("w+b") as file:
        one.send(Frame(Kind.GO))
        one.send(Frame(Kind.MAP, {"arena": 1}), file.fileno())
        assert other.receive()[1] is None
        frame, descriptor = other.receive()
        assert frame.kind is Kind.MAP and descriptor is not None
        assert os.fstat(descriptor).st_ino == os.fstat(file.fileno()).st_ino
        os.close(descriptor)
    one.close()
    other.close()


def test_silence_ends_and_failures_are_told_apart() -> None:
    one, other = pair()
    with pytest.raises(Unreachable, match=r"said nothing for 0\.01 s"):
        other.receive(deadline_s=0.01)
    one.send(Frame(Kind.LOADED))
    with pytest.raises(BadInput, match="said loaded where ready was due"):
        other.expect(Kind.READY, deadline_s=1)
    one.send(Frame(Kind.FAILED, {"why": "no room"}))
    with pytest.raises(Unreachable, match="no room"):
        other.expect(Kind.READY, deadline_s=1)
    one.close()
    with pytest.raises(Unreachable, match="ended"):
        other.receive()
    with pytest.raises(Unreachable, match="took no go"):
        other.send(Frame(Kind.GO))
    other.close()
    with pytest.raises(Unreachable):
        other.receive(deadline_s=1)


def test_an_end_in_the_middle_of_a_frame_is_an_end() -> None:
    one, other = socket.socketpair()
    channel = Channel(other, deadline_s=1)
    one.sendall(LENGTHS.pack(100, 0) + b"half")
    one.close()
    with pytest.raises(Unreachable, match="middle of a frame"):
        channel.receive()
    channel.close()


def test_who_does_not_read_holds_nobody_for_long() -> None:
    one, other = pair(deadline_s=0.05)
    frame = Frame(Kind.STEP, {}, {"a": np.zeros(4 << 20, dtype=np.int64)})
    with pytest.raises(Unreachable, match="took no step"):
        one.send(frame)
    one.close()
    other.close()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no rank listens"):
        Channel.connect(str(tmp_path / "nobody.sock"), deadline_s=1)
