"""A quick run covers every room, and what it names is there."""

import ast

import pytest

from tests import quick, timetable
from tests.unit.test_rooms import ROOMS

FILES = {file: ast.parse((quick.ROOT / file).read_text("utf-8")) for file in quick.short_files()}


def _imported(tree: ast.Module) -> set[str]:
    """Modules of the package that a test file imports, functions included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("moepp_megatron.") for name in found if "moepp_megatron" in name}


# Nothing is computed in `version`.
@pytest.mark.parametrize("room", [room for room in ROOMS if room != "version"])
def test_every_room_has_a_short_file(room: str) -> None:
    inside = [
        file
        for file, tree in FILES.items()
        if any(name == room or name.startswith(f"{room}.") for name in _imported(tree))
    ]
    assert inside


@pytest.mark.parametrize("case", quick.CASES.values())
def test_every_case_is_there(case: str) -> None:
    file, _, name = case.partition("::")
    folder = quick.ROOT / "tests" / file
    function = name.split("[")[0]
    assert not function or f"def {function}(" in folder.read_text("utf-8")


def test_longest_units_come_first_and_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timetable, "TOGETHER", ["tests/slurm/"])
    monkeypatch.setattr(timetable, "recorded", lambda: {"a.py": 1.0, "b.py": 9.0})
    order = (
        "a.py::1",
        "b.py::2",
        "tests/slurm/test_x.py::3",
        "a.py::4",
        "tests/slurm/test_y.py::5",
    )
    items = [_Item(node_id) for node_id in order]
    timetable.longest_first(items)  # type: ignore[arg-type]
    assert "".join(item.nodeid[-1] for item in items) == "35214"


class _Item:
    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid


def test_progress_counts_seconds_not_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """One long file and one short one: after the long one most is done."""
    monkeypatch.setattr(timetable, "recorded", lambda: {"tests/a.py": 90.0, "tests/b.py": 10.0})
    clock = iter([0.0, 0.0, 45.0, 45.0, 45.0, 50.0])
    monkeypatch.setattr(timetable.time, "monotonic", lambda: next(clock))
    progress = timetable.Progress(None)  # type: ignore[arg-type]
    progress.starts_with(["tests/a.py::x", "tests/b.py::y", "tests/b.py::z"])
    shown: list[str] = []
    progress._write = shown.append  # type: ignore[method-assign]
    progress.pytest_runtest_logreport(_report("tests/a.py::x", "failed", "call"))
    progress.pytest_runtest_logreport(_report("tests/a.py::x", "passed", "teardown"))
    assert shown[0] == "\nFAILED tests/a.py::x (call)\nwhy\n"
    assert shown[1:] == ["[ 90%] 1 of 3 tests, 1 failed; 45 s so far, about 5 s left"]


def _report(node_id: str, outcome: str, when: str) -> pytest.TestReport:
    return pytest.TestReport(node_id, ("", 0, ""), {}, outcome, "why", when, duration=1.0)  # type: ignore[arg-type]
