"""The house: which room may import which, read from the source."""

import ast
import re
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from benchmarks.pages import PAGES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moepp_megatron"
# From the top down: a room imports only rooms that come after it.
WORKBENCH = ["experiments", "report", "planning", "inspection", "bench", "profiling", "doctor"]
ENGINE = ["cluster", "interop", "training", "model", "moe", "data", "observe", "runtime", "config"]
FLOOR = ["catalogue", "layer_settings", "experts", "file_names", "version"]
ROOMS = ["cli", *(f"workbench.{room}" for room in WORKBENCH), *ENGINE, *FLOOR]

# Lines of Python that each room may have. Who adds lines takes others away; a ceiling rises only
# for a named capability.
CEILINGS = {
    "cli": 4180,
    "workbench.experiments": 3130,
    "workbench.report": 6080,
    "workbench.planning": 4210,
    "workbench.inspection": 750,
    "workbench.bench": 1520,
    "workbench.profiling": 3720,
    "workbench.doctor": 1700,
    "cluster": 330,
    "interop": 6680,
    "training": 12620,
    "model": 1510,
    "moe": 6910,
    "data": 5380,
    "observe": 2910,
    "runtime": 4330,
    "config": 6930,
    "catalogue": 460,
    "layer_settings": 254,
    "experts": 330,
    "file_names": 60,
    "version": 10,
}
# All Python files of the package, of the tests and of benchmarks/ with its results.
MOST_FILES, MOST_TEST_LINES = 560, 61_500
MOST_BENCHMARK_LINES, MOST_WORDS = 4_470, 51_700

# Not yet: planning says in which order to read it, the experiments nothing.
UNLISTED = ("workbench/experiments", "workbench/planning")
LISTED = sorted(
    room
    for room in (str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.rglob("*/__init__.py"))
    if not room.startswith(UNLISTED)
)


def _modules() -> dict[str, Path]:
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        modules[name.removesuffix(".__init__").removesuffix("__init__")] = path
    return modules


MODULES = _modules()


def _imports(name: str) -> Iterator[str]:
    """The modules of the package that a module imports, those inside functions included."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        parts = node.module.split(".")
        if parts[0] != PACKAGE.name:
            continue
        target = ".".join(parts[1:])
        for alias in node.names:
            inner = f"{target}.{alias.name}".lstrip(".")
            yield inner if inner in MODULES else target


def _room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "workbench" else parts[0]


def test_every_room_is_known() -> None:
    rooms = {_room(name) for name in MODULES if name not in ("", "workbench")}
    assert rooms == set(ROOMS)


def test_arrows_point_down() -> None:
    upwards = [
        (name, target)
        for name in MODULES.keys() - {"", "workbench"}
        for target in _imports(name)
        if ROOMS.index(_room(target)) < ROOMS.index(_room(name))
    ]
    assert upwards == []


def test_the_engine_never_imports_the_workbench() -> None:
    upwards = [
        (name, target)
        for name in MODULES
        if _room(name) in [*ENGINE, *FLOOR]
        for target in _imports(name)
        if target.startswith("workbench")
    ]
    assert upwards == []


def test_no_circle() -> None:
    graph = {name: set(_imports(name)) - {""} for name in MODULES if name}
    # Raises CycleError with the circle.
    assert list(TopologicalSorter(graph).static_order())


def _lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_no_room_outgrows_its_ceiling() -> None:
    lines = dict.fromkeys(ROOMS, 0)
    for name, path in MODULES.items():
        if name not in ("", "workbench"):
            lines[_room(name)] += _lines([path])
    over = {room: (n, CEILINGS[room]) for room, n in lines.items() if n > CEILINGS[room]}
    assert over == {}, "lines and ceiling"


def test_the_house_stays_as_small_as_it_is() -> None:
    assert len(MODULES) <= MOST_FILES
    assert _lines((ROOT / "tests").rglob("*.py")) <= MOST_TEST_LINES
    benchmarks = ROOT / "benchmarks"
    files = [*benchmarks.glob("*.py"), *benchmarks.glob("*.sh"), *benchmarks.rglob("*.json")]
    assert _lines(files) <= MOST_BENCHMARK_LINES
    # As many words as in the tree: pages that are generated are not counted.
    generated = {f"docs/{page}" for page in PAGES}
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    own = [page for page in pages if page.relative_to(ROOT).as_posix() not in generated]
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in own) <= MOST_WORDS


@pytest.mark.parametrize("room", LISTED)
def test_a_room_says_what_each_of_its_files_is(room: str) -> None:
    source = (PACKAGE / room / "__init__.py").read_text(encoding="utf-8")
    listed = re.findall(r"^ *(\w+\.py) +\S", ast.get_docstring(ast.parse(source)) or "", re.M)
    files = {path.name for path in (PACKAGE / room).glob("*.py")} - {"__init__.py"}
    assert sorted(listed) == sorted(files)
