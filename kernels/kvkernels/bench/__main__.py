"""Runs the benchmark where the `kvstore` command is not installed."""

import sys

from kvkernels.bench.command import kernels

if __name__ == "__main__":
    sys.exit(kernels.main(standalone_mode=False))
