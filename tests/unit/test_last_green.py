"""Only a run of all long tests, all of them passed, is recorded as the last green one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
from pathlib import Path
import pytest
from tests import last_green


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    result = yield
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    last_green.record(session.config, terminal.stats, Path("last_green.json"))
    return result
"""
TESTS = """
import os, pytest

@pytest.mark.slow
def test_a():
    assert "FAILS" not in os.environ

@pytest.mark.matrix
def test_b():
    pytest.skip("not here")

def test_c():
    pass
"""
LONG = ("-m", "matrix or slow")


@pytest.mark.parametrize(
    ("options", "fails", "is_recorded"),
    [
        (LONG, False, True),
        ((), False, True),
        (LONG, True, False),
        (("-m", "matrix"), False, False),
        ((*LONG, "-k", "test_a"), False, False),
        ((*LONG, "."), False, False),
        ((*LONG, "--quick"), False, False),
        ((*LONG, "--collect-only"), False, False),
    ],
)
def test_only_a_whole_green_run_is_recorded(tmp_path, options, fails, is_recorded):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  matrix\n  slow\n")
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root} | ({"FAILS": "1"} if fails else {})
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    path = tmp_path / "last_green.json"
    assert path.exists() == is_recorded
    if is_recorded:
        said = json.loads(path.read_text())
        assert said["passed"] == 1
        assert said["skipped"] == ["test_it.py::test_b"]
        assert {"date", "commit", "minutes", "python", "torch", "megatron-core"} <= set(said)
