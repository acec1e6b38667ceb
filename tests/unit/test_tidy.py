"""The law is a test: what reviews would otherwise have to say again and again."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kvstore", "workers/kvworkers", "kernels/kvkernels")
GENERATED = ("kvstore/rpc/v1/", "kvstore/rpc/envoy/")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
BANNED_NAMES = {"common", "helper", "helpers", "lib", "manager", "misc", "stuff", "util", "utils"}
ROOM_DOC_LINES = 5

# Pieces are joined here so that this file does not match itself.
MACHINE_PATHS = re.compile("|".join([r"(?<![\w.])/" + r"work/", "/" + "root/", "/" + r"home/\w"]))
REGISTRIES = re.compile(
    "|".join(
        [
            "pypi" + r"\.org",
            "pythonhosted" + r"\.org",
            "download" + r"\.pytorch\.org",
            "registry" + r"\.npmjs",
            "--(extra-)?" + "index-url",
            "find" + "-links",
        ]
    )
)
TODO_WITHOUT_ISSUE = re.compile(r"\b(" + "TO" + "DO|FIX" + r"ME)\b(?!\(#\d+\))")


def _tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    if listing.returncode:  # an unpacked archive: everything but environments and caches
        found = (p for p in ROOT.rglob("*") if not any(s.startswith(".") for s in p.parts))
        return sorted(p for p in found if p.is_file())
    paths = (ROOT / name for name in listing.stdout.decode().split("\0") if name)
    return sorted(path for path in paths if path.is_file())


TRACKED = _tracked()
PYTHON = [
    p for p in TRACKED if p.suffix == ".py" and not any(part in p.as_posix() for part in GENERATED)
]
SOURCES = [p for p in PYTHON if p.relative_to(ROOT).as_posix().startswith(PACKAGES)]
TESTS = [p for p in PYTHON if p.is_relative_to(ROOT / "tests")]
DOCUMENTS = [p for p in TRACKED if p.suffix == ".md"]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PYTHON}


def _where(path: Path, line: int | None = None) -> str:
    name = path.relative_to(ROOT).as_posix()
    return name if line is None else f"{name}:{line}"


def _module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("workers", "kernels"):
        parts = parts[1:]
    return ".".join(parts)


def _nodes(*kinds: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield path, node


def _none(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


def test_there_is_something_to_judge() -> None:
    assert len(SOURCES) > 20
    assert len(TESTS) > 3


def test_files_are_short() -> None:
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON}
    _none([f"{_where(p)}: {n} lines" for p, n in counts.items() if n > MAX_FILE_LINES])


def test_functions_are_short() -> None:
    found = []
    for path, node in _nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            found.append(f"{_where(path, node.lineno)} {node.name}: {lines} lines")
    _none(found)


def test_module_names_say_what_is_inside() -> None:
    names = {path: (path.parent.name if path.stem == "__init__" else path.stem) for path in PYTHON}
    _none([_where(p) for p, n in names.items() if n in BANNED_NAMES or re.search(r"[a-z]2$", n)])


def test_every_module_is_reached_by_a_test() -> None:
    named: set[str] = set()
    for path in TESTS:
        text = path.read_text(encoding="utf-8")
        named.update(re.findall(r"\bkv\w+(?:\.\w+)+", text))
        for package, names in re.findall(r"from (\S+) import ([^\n]*)", text):
            named.update(f"{package}.{name}" for name in re.findall(r"\w+", names))
    named.update(prefix for name in list(named) for prefix in _prefixes(name))
    stems = {path.stem for path in TESTS}
    modules = [_module_name(path) for path in SOURCES if not path.stem.startswith("__")]
    _none(
        [
            f"{module}: no test names it"
            for module in modules
            if module not in named and f"test_{module.rpartition('.')[2]}" not in stems
        ]
    )


def _prefixes(name: str) -> Iterator[str]:
    """Yield `a` and `a.b` for `a.b.c`: a name inside a module names the module."""
    parts = name.split(".")
    yield from (".".join(parts[:length]) for length in range(1, len(parts)))


def test_rooms_say_what_they_know_in_few_lines() -> None:
    found = []
    for room in sorted(p for p in (ROOT / "kvstore").iterdir() if (p / "__init__.py").is_file()):
        doc = ast.get_docstring(TREES[room / "__init__.py"]) or ""
        if not doc or len(doc.splitlines()) > ROOM_DOC_LINES:
            found.append(f"{room.name}: docstring of {len(doc.splitlines())} lines")
        elif "Knows:" not in doc or "Must not know:" not in doc:
            found.append(f"{room.name}: docstring without 'Knows:' and 'Must not know:'")
    _none(found)


def test_tiers_are_strangers() -> None:
    devices = {"block_rows", "device_flights", "device_health", "device_threads"}
    shared = {"base", "breaker", "quotas", "sums"} | devices
    found = []
    for path in (ROOT / "kvstore" / "tiers").glob("*.py"):
        tier = path.stem.partition("_")[0]
        if path.stem == "__init__":
            continue
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvstore.tiers"):
                leaves = (node.module or "").split(".")[2:] or [a.name for a in node.names]
                other = leaves[0]
                if other not in shared and other.partition("_")[0] != tier:
                    found.append(f"{_where(path, node.lineno)} imports {other}")
    _none(found)


def test_nothing_prints() -> None:
    found = []
    for path, node in _nodes(ast.Call):
        assert isinstance(node, ast.Call)
        if isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(_where(path, node.lineno))
    _none(found)


def test_broad_excepts_stand_at_task_boundaries() -> None:
    found = []
    for path, node in _nodes(ast.ExceptHandler):
        assert isinstance(node, ast.ExceptHandler)
        names = (
            {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {""}
        )
        if not names & {"", "Exception", "BaseException"}:
            continue
        last = node.body[-1]
        if isinstance(last, ast.Raise) and last.exc is None:
            continue  # cleans up and goes on falling
        line = path.read_text(encoding="utf-8").splitlines()[node.lineno - 1]
        if "task boundary" not in line:
            found.append(f"{_where(path, node.lineno)} {line.strip()}")
    _none(found)


def test_exported_names_are_sorted_and_exist() -> None:
    found = []
    for path, node in _nodes(ast.Assign):
        assert isinstance(node, ast.Assign)
        if not any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            continue
        exported = ast.literal_eval(node.value)
        if list(exported) != sorted(set(exported)):
            found.append(f"{_where(path, node.lineno)}: __all__ is not sorted and unique")
        bound = {
            alias.asname or alias.name
            for inner in ast.walk(TREES[path])
            if isinstance(inner, ast.Import | ast.ImportFrom)
            for alias in inner.names
        }
        bound |= {
            inner.name
            for inner in TREES[path].body
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        }
        bound |= {
            target.id
            for inner in TREES[path].body
            if isinstance(inner, ast.Assign | ast.AnnAssign)
            for target in (inner.targets if isinstance(inner, ast.Assign) else [inner.target])
            if isinstance(target, ast.Name)
        }
        lazy = {n.name for n in TREES[path].body if isinstance(n, ast.FunctionDef)}
        if "__getattr__" not in lazy:
            found += [
                f"{_where(path)}: {n} exported, not there" for n in exported if n not in bound
            ]
    _none(found)


def test_documents_have_one_title() -> None:
    found = []
    for path in DOCUMENTS:
        outside = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
        titles = len(re.findall(r"^# ", outside, flags=re.M))
        if titles != 1:
            found.append(f"{_where(path)}: {titles} titles")
    _none(found)


def test_links_between_documents_lead_somewhere() -> None:
    found = []
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            outward = "://" in target or target.startswith("mailto:")
            if not outward and not (path.parent / target).exists():
                found.append(f"{_where(path)}: {target}")
    _none(found)


def test_paths_named_in_documents_exist() -> None:
    named = r"(?<![\w/.-])((?:kvstore|kernels|workers|tests|docs|proto)/[\w/.-]*[\w/])"
    found = []
    for path in DOCUMENTS:
        names = re.findall(named, path.read_text(encoding="utf-8"))
        found += [f"{_where(path)}: {name}" for name in names if not (ROOT / name).exists()]
    _none(found)


@pytest.mark.parametrize(
    ("law", "pattern"),
    [
        ("paths of one machine", MACHINE_PATHS),
        ("addresses of package registries", REGISTRIES),
        ("work without an issue number", TODO_WITHOUT_ISSUE),
    ],
)
def test_tracked_text_is_free_of(law: str, pattern: re.Pattern[str]) -> None:
    found = []
    for path in TRACKED:
        if path.suffix in (".gz", ".png", ".gguf"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{_where(path, number)} {law}: {line.strip()[:80]}")
    _none(found)


def test_the_readme_shows_the_example_that_is_tested() -> None:
    shown, tested = (
        re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.S | re.M)
        for name in ("README.md", "docs/client.md")
    )
    assert shown and shown[0] == tested[0]  # tests/rpc/test_client_page.py runs it


def test_ci_runs_what_people_run() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("check", "test"):
        assert re.search(rf"^make {target}$", ci, flags=re.M)
    for target in ("check", "test", "test-slow"):
        assert re.search(rf"^{target}:.*## ", makefile, flags=re.M)
