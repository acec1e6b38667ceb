import asyncio
from pathlib import Path

from prometheus_client import CollectorRegistry

from kvstore.directory.events import TierKind
from kvstore.observe.metrics import TierMetrics
from kvstore.service.disk_space import DiskWatch
from tests.patience import until


async def test_each_tier_s_file_system_is_looked_at(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    gone = tmp_path / "gone"
    directories = {TierKind.NVME: tmp_path, TierKind.FILES: gone, TierKind.PEER: None}
    watch = DiskWatch(directories, TierMetrics(registry))

    def value(name: str, **labels: str) -> float:
        return registry.get_sample_value(f"kvstore_tier_{name}", labels) or 0.0

    await until(lambda: value("disk_bytes", tier="nvme") > 0)
    assert 0 < value("disk_free_bytes", tier="nvme") <= value("disk_bytes", tier="nvme")
    labels = {"tier": "files", "operation": "statvfs", "error": "No such file or directory"}
    await until(lambda: value("device_errors_total", **labels) == 1)
    await watch.close()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "disk space"]
