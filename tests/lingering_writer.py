"""A process that reserves a slot, closes its session's socket, and lives on until killed.

Run as `python tests/lingering_writer.py RUN_DIR LABEL`; prints one line of JSON when it is there.
"""

import json
import os
import signal
import sys
from pathlib import Path

import grpc

from kvstore.core.names import Root, chain, pack_tokens
from kvstore.rpc.convert import namespace_to_proto
from kvstore.rpc.v1 import cache_pb2, cache_pb2_grpc
from kvstore.transport.session_socket import Hello, connect_session
from tests.session_process import PAYLOAD, SHARES, namespace


def main(run_dir: Path, label: str) -> None:
    hello = Hello("lingering", (os.getpid(),))
    grant, fd, sock = connect_session(str(run_dir / "keeper.sock"), hello, deadline_ms=5_000)
    os.close(fd)
    metadata = (("kvstore-session-bin", grant.token),)
    with grpc.insecure_channel(grant.rpc) as channel:
        stub = cache_pb2_grpc.CacheNodeStub(channel)
        opening = cache_pb2.OpenSessionRequest(
            namespace=namespace_to_proto(namespace(label)),
            block_bytes=PAYLOAD,
            payload_bytes=PAYLOAD,
            shares=SHARES,
        )
        opened = stub.OpenSession(opening, metadata=metadata, timeout=5)
        [name] = chain(Root(opened.root), pack_tokens([1] * 16))
        wanted = cache_pb2.AcquireRequest(root=opened.root, names=name, reserve=1)
        answer = stub.Acquire(wanted, metadata=metadata, timeout=5)
    sock.close()
    sys.stdout.write(json.dumps({"reserved": len(answer.reserved_slots)}) + "\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
