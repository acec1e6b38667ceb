"""docs/deploy.md says what is so: every key with its default, every command with its arguments."""

import re
import shlex
from pathlib import Path

from kvworkers.cluster.config import ClusterConfig
from kvworkers.cluster.declared import KEYS
from kvworkers.commands.down import down
from kvworkers.commands.operate import drain, restart, scale, status
from kvworkers.commands.up import up

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
COMMANDS = {
    "up": up, "down": down, "drain": drain, "restart": restart, "scale": scale, "status": status,
}  # fmt: skip


def rows() -> dict[str, str]:
    """Return {key: default} of the page's table of keys."""
    table = PAGE.partition("| key | meaning | default |")[2].partition("\n\n")[0]
    found = {}
    for line in table.splitlines()[2:]:
        keys, _, default = (cell.strip() for cell in line.strip("|").split("|"))
        for key in keys.split(","):
            found[key.strip(" `")] = default.strip("`")
    return found


def test_every_key_is_explained_with_its_default() -> None:
    listed = rows()
    assert set(listed) == set(KEYS)
    config = ClusterConfig(model=Path("m"), run_dir=Path("r"))
    for key in ("listen", "drain_ms", "ray.namespace", "ray.spare_cpus", "workers.count",
                "workers.tensor_parallel", "frontends.count", "nodes.policy"):  # fmt: skip
        assert listed[key] == str(getattr(config, KEYS[key][0])), key


def test_the_commands_of_the_page_are_understood() -> None:
    block = PAGE.partition("```sh\n")[2].partition("```")[0]
    lines = [line.partition("#")[0] for line in block.splitlines()]
    assert len(lines) == 3
    for line in lines:
        _, name, *arguments = shlex.split(line)
        COMMANDS[name].make_context(name, list(arguments))
    for name in re.findall(r"^\| `kvstore (\w+)", PAGE, re.MULTILINE):
        assert name in COMMANDS
