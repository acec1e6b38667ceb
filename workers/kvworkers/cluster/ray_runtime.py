"""A private Ray on this machine: loopback only, its own token, its own short folder.

The traps it steps around: Ray binds the machine's outward address unless told that clusters
on this system are local; it joins any cluster whose note lies in its temp folder; it writes an auth
token into the home folder; and by default it takes a third of the memory for objects.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from kvstore.core.errors import Unreachable

NAMESPACE: Final = "kvstore"
"""Ray's namespace for the named actors of a cluster."""

_OBJECT_STORE_BYTES: Final = 100 << 20
"""Nothing but small reports passes through Ray's object store."""

_PRESTARTED: Final = 3
"""Worker processes that Ray has ready before the first actor asks: controller, host, one more."""


def environment(run_dir: Path) -> dict[str, str]:
    """Return what Ray's processes need in their environment."""
    return {
        # Despite the name it means "a cluster may span machines": 0 binds 127.0.0.1.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # The arena counts as used memory; the worker bounds itself, so Ray must not kill for it.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_TMPDIR": str(run_dir),
        # Compute threads that wait for one another must not spin on cores that others need.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


@contextmanager
def local_ray(run_dir: Path, *, workers: int) -> Iterator[Any]:
    """Run a Ray cluster of this process's own; yields the `ray` module.

    Ends every process of it on the way out. Raises `Unreachable` when Ray does not start.
    """
    os.environ.update(environment(run_dir))
    import ray

    try:
        ray.init(
            address="local",
            namespace=NAMESPACE,
            # Logical: an actor must never wait for a core that another part only sleeps on.
            num_cpus=max(workers, _PRESTARTED),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(run_dir / "ray"),
            log_to_driver=False,
            configure_logging=False,
        )
    except (RuntimeError, ConnectionError, TimeoutError, OSError) as error:
        raise Unreachable(f"Ray did not start: {error} (logs in {run_dir / 'ray'})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def joined_ray(address: str, *, namespace: str) -> Iterator[Any]:
    """Join a Ray cluster that runs already (`auto` or `host:port`); yields the `ray` module.

    Its authentication token and the rest of its environment are the caller's. On the way out only
    this process leaves. Raises `Unreachable` when there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    try:
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            configure_logging=False,
        )
    except (RuntimeError, ConnectionError, TimeoutError, OSError, ValueError) as error:
        raise Unreachable(f"no Ray cluster at {address!r}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
