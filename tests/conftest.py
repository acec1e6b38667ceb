"""Settings of all tests."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Workers of a parallel run share the cores; torch reads this at its import, and so do processes
# that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton decides at its import; the first test to import it decides for all of a run.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Machines that run tests are shared: how long one example takes says nothing. The suite has its
# own timeouts, and an example that fails is printed with what it takes to replay it.
settings.register_profile(
    "kvstore", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("kvstore")


def pytest_configure(config: pytest.Config) -> None:
    """End a terminated run like an interrupted one: fixtures end the processes they started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
