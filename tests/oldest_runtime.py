"""Import the store in an environment that has only its own, oldest supported dependencies.

Run by `make oldest`: generated stubs must load beside the runtimes that engines pin, and no module
of the store may need torch, triton or ray.
"""

import importlib
import pkgutil
import sys

import kvstore

GUESTS = ("kvstore.adapters.",)  # imported only by their hosts
EXTRAS = (  # imported only where they are asked for; they need the extra of that name
    "kvstore.router.redis_source",
    "kvstore.router.vllm_events",
    "kvstore.router.vllm_source",
    "kvstore.rpc.redis_publisher",
    "kvstore.rpc.redis_stream",
)


def main() -> int:
    """Import every module of the store; return the number of failures."""
    failures = 0
    names = [m.name for m in pkgutil.walk_packages(kvstore.__path__, "kvstore.")]
    for name in names:
        if name.startswith((*GUESTS, *EXTRAS)) or name.rpartition(".")[2] == "__main__":
            continue
        try:
            importlib.import_module(name)
        except ImportError as error:
            failures += 1
            sys.stderr.write(f"{name}: {error}\n")
    heavy = sorted({"torch", "triton", "ray"} & set(sys.modules))
    if heavy:
        failures += 1
        sys.stderr.write(f"the store pulled in {', '.join(heavy)}\n")
    sys.stdout.write(f"{len(names)} modules, {failures} failures\n")
    return min(failures, 1)


if __name__ == "__main__":
    raise SystemExit(main())
