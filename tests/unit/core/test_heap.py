import subprocess
import sys

from tests.patience import PATIENCE_S

PROGRAM = """
import gc
from kvstore.core.heap import settle_heap

kept = [[number] for number in range(1_000)]
cycle = []
cycle.append(cycle)
del cycle
before = gc.get_freeze_count()
settle_heap()
frozen = gc.get_freeze_count() - before
tracked = {id(item) for item in gc.get_objects(generation=2)}
assert frozen >= 1_000, frozen
assert not any(id(item) in tracked for item in kept), "a later pass would walk them again"
assert gc.collect() == 0, "garbage was kept alive"
"""


def test_later_passes_leave_out_what_was_there() -> None:
    # In a process of its own: what is frozen stays so.
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=PATIENCE_S)
