"""Only a run of all long tests, all of them passed, is recorded as the last green one."""

import json
from types import SimpleNamespace

import pytest

from tests.last_green import record

Source = pytest.Config.ArgsSource
LONG = {"quick": False, "keyword": "", "deselect": None, "markexpr": "matrix or slow"}


def reports(outcome, mark):
    return [
        SimpleNamespace(nodeid=f"test_it.py::{outcome}", when=when, keywords={mark: 1}, duration=60)
        for when in ("setup", "call")
    ]


PASSED = {"passed": reports("passed", "slow"), "skipped": reports("skipped", "matrix")[:1]}


@pytest.mark.parametrize(
    ("options", "source", "stats", "is_recorded"),
    [
        ({}, Source.TESTPATHS, PASSED, True),
        ({"markexpr": ""}, Source.TESTPATHS, PASSED, True),
        ({"markexpr": "matrix"}, Source.TESTPATHS, PASSED, False),
        ({"keyword": "test_a"}, Source.TESTPATHS, PASSED, False),
        ({"deselect": ["tests/slurm"]}, Source.TESTPATHS, PASSED, False),
        ({"quick": True}, Source.TESTPATHS, PASSED, False),
        ({}, Source.ARGS, PASSED, False),
        ({}, Source.TESTPATHS, PASSED | {"failed": reports("failed", "other")}, False),
        # As of --collect-only.
        ({}, Source.TESTPATHS, {}, False),
    ],
)
def test_only_a_whole_green_run_is_recorded(tmp_path, options, source, stats, is_recorded):
    path = tmp_path / "last_green.json"
    record(
        SimpleNamespace(args_source=source, option=SimpleNamespace(**LONG | options)), stats, path
    )
    assert path.exists() == is_recorded
    if is_recorded:
        said = json.loads(path.read_text())
        assert said["passed"] == 1
        assert said["skipped"] == ["test_it.py::skipped"]
        assert {"date", "commit", "minutes", "python", "torch", "megatron-core"} <= set(said)
