"""The table of long tests."""

import pytest

from tests.long_table import lines_of


def report(node_id: str, outcome: str, *properties: tuple[str, object]) -> pytest.TestReport:
    marks = {"slow": 1} if "kills" in node_id else {}
    location = ("", 0, "")
    return pytest.TestReport(
        node_id, location, marks, outcome, None, "call", (), 61.0, 0.0, 0.0, list(properties)
    )  # type: ignore[arg-type]


def test_layouts_and_long_tests_are_one_table() -> None:
    cell = [("cell", "ep2"), ("ranks", 2), ("loss", 3e-8), ("gradient", 2e-7)]
    killed = [("ranks", 2), ("measured", "20 kills")]
    passed = [
        report("tests/parallel/test_matrix.py::test_layout[2 ep2]", "passed", *cell),
        report("tests/unit/test_other.py::test_short", "passed"),
    ]
    failed = [report("tests/faults/test_killed_ranks.py::test_kills[2]", "failed", *killed)]
    lines = lines_of({"passed": passed, "failed": failed})
    assert [" ".join(line.split()) for line in lines] == [
        "",
        "ranks loss error gradient error seconds measured result",
        "ep2 2 3.0e-08 2.0e-07 61 pass",
        "faults/test_killed_ranks.py test_kills[2] 2 - - 61 20 kills FAIL",
        "1 of 2 pass 3.0e-08 2.0e-07 122 FAIL",
    ]
    starts = {line.rstrip().rindex(" ") for line in lines[1:]}
    assert len(starts) == 1, "columns stand in line"


def test_short_tests_have_none() -> None:
    assert lines_of({"passed": [report("tests/unit/test_other.py::test_short", "passed")]}) == []
