"""`python -m kvworkers.bench`: the command where the package is not installed."""

import sys

from kvworkers.bench.command import worker

sys.exit(worker.main(standalone_mode=False))
