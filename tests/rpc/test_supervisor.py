"""Nothing is left behind: real process trees that fork, detach, ignore signals and die."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from kvworkers.cluster.state import started_ticks

from tests.patience import PATIENCE_S

SUPERVISE = """
    import json, sys
    from kvworkers.cluster.supervisor import supervise
    ended = supervise([sys.executable, *sys.argv[1:]], on_ready=lambda f: print(json.dumps(f)))
    print(json.dumps([ended.status, ended.interrupted, ended.leftovers]), flush=True)
"""

TREE = """
    import os, signal, subprocess, sys, time
    ready = int(sys.argv[sys.argv.index("--ready-fd") + 1])
    def child(code, **options):
        code = "import os, signal, sys, time;" + code
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, **options)
    tell = "print(os.getpid(), flush=True); time.sleep(600)"
    children = [
        child(tell),
        child("DEAF" + tell),
        child("os.setsid();" + tell),
        child("pid = os.fork();\\nif pid: os._exit(0)\\nos.setsid();" + tell),
    ]
    pids = [int(c.stdout.readline()) for c in children]
    BEFORE
    os.write(ready, str(pids).encode())
    AFTER
"""


def started(
    tmp_path: Path, *, after: str, before: str = "", deaf: bool = False
) -> tuple["subprocess.Popen[str]", list[int]]:
    tree = tmp_path / "tree.py"
    code = textwrap.dedent(TREE).replace("BEFORE", before).replace("AFTER", after)
    code = code.replace("DEAF", "signal.signal(15, signal.SIG_IGN);" if deaf else "")
    tree.write_text(code)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SUPERVISE), str(tree)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().strip("[]\n ").split(",")]
    return process, pids


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=PATIENCE_S)
    return output.strip()


def gone(pids: list[int]) -> bool:
    return not any(started_ticks(pid) for pid in pids)


def test_ctrl_c_ends_a_session_in_order_and_then_its_leftovers(tmp_path: Path) -> None:
    orderly = "signal.signal(15, lambda *_: sys.exit(7))"
    process, pids = started(tmp_path, before=orderly, after="while True: signal.pause()")
    process.send_signal(signal.SIGINT)
    assert finish(process) == "[7, true, 4]"
    assert gone(pids)


def test_a_session_that_ends_by_itself_leaves_nothing(tmp_path: Path) -> None:
    process, pids = started(tmp_path, after="sys.exit(3)")
    assert finish(process) == "[3, false, 4]"
    assert gone(pids)


def test_a_session_that_crashes_leaves_nothing(tmp_path: Path) -> None:
    process, pids = started(tmp_path, after="os.kill(os.getpid(), 9)", deaf=True)
    assert finish(process) == "[-9, false, 4]"
    assert gone(pids)


def test_a_second_signal_does_not_wait_for_order(tmp_path: Path) -> None:
    stubborn = "signal.signal(15, signal.SIG_IGN)"
    process, pids = started(tmp_path, before=stubborn, after="while True: signal.pause()")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert finish(process) == "[-9, true, 4]"
    assert gone(pids)


def test_a_killed_supervisor_takes_its_session_along() -> None:
    code = """
        import os, subprocess, sys
        child = '''
        import os, signal
        from kvworkers.cluster.supervisor import die_with_parent
        die_with_parent()
        print(os.getpid(), flush=True)
        signal.pause()
        '''
        import textwrap
        subprocess.run([sys.executable, '-c', textwrap.dedent(child)])
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    handle = os.pidfd_open(child)
    try:
        parent.kill()
        parent.wait()
        import select

        assert select.select([handle], [], [], PATIENCE_S)[0], "the session outlived its supervisor"
    finally:
        os.close(handle)
        parent.stdout.close()


@pytest.mark.parametrize("flag", ["--http", "--grpc"])
def test_a_busy_port_names_its_flag(flag: str) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        for command in ("up", "demo"):
            free = "--grpc" if flag == "--http" else "--http"
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "kvstore.cli.main",
                    command,
                    flag,
                    address,
                    free,
                    "127.0.0.1:0",
                ],
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
            assert done.returncode == 2
            assert f"{flag} {address}" in done.stderr
            assert len(done.stderr.splitlines()) == 1
