"""Tests that several workers share are reported as by one process, whatever they do to it."""

from pathlib import Path

import pytest

from tests.commands import module

CONFTEST = """
from tests import workers


class Workers(workers.Workers):
    def import_once(self):
        "No test here needs the imports."


def pytest_configure(config):
    config.pluginmanager.register(Workers(config, 2))
"""
ONE = """
import os, signal, warnings

def test_passes(tmp_path):
    print("not shown")
    assert tmp_path.parent.name.startswith("worker-")

def test_fails():
    print("shown")
    assert 1 == 2

def test_warns():
    warnings.warn("careful", DeprecationWarning)

def test_is_killed():
    os.kill(os.getpid(), signal.SIGKILL)

def test_after_it():
    pass

def test_ends_the_process():
    os._exit(3)
"""
OTHER = """
import os, pytest

@pytest.mark.skip(reason="not here")
def test_is_skipped():
    pass

@pytest.fixture(scope="session")
def kept():
    yield
    print("given back")
    raise ValueError("at the end")

def test_has_a_fixture(kept, capfd):
    os.system("echo from a child")
    assert capfd.readouterr().out == "from a child\\n"
"""


def _printed(folder: Path, *options: str, **files: str) -> str:
    (folder / "conftest.py").write_text(CONFTEST)
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    return module("pytest", "-p", "no:cacheprovider", *options, ".", cwd=folder).stdout


def test_reports_are_those_of_one_process(tmp_path: Path) -> None:
    printed = _printed(tmp_path, "-rs", one=ONE, other=OTHER)
    assert "3 failed, 4 passed, 1 skipped, 1 warning, 1 error" in printed
    assert "assert 1 == 2" in printed
    assert "shown" in printed
    assert "not shown" not in printed
    assert "DeprecationWarning: careful" in printed
    assert "test_is_killed: the worker ended in this test: SIGKILL" in printed
    assert "test_ends_the_process: the worker ended in this test: status 3" in printed
    assert "not here" in printed
    assert "ValueError: at the end" in printed


def test_first_failure_ends_all_workers(tmp_path: Path) -> None:
    printed = _printed(
        tmp_path,
        "-x",
        fails="def test_fails():\n    assert False",
        waits="import time\ndef test_waits():\n    time.sleep(100)",
    )
    assert "1 failed in" in printed
    assert "stopping after 1 failures" in printed


@pytest.mark.parametrize("text", ["import nothing_of_that_name", "def test_x(): ="])
def test_collection_that_fails_is_said_and_nothing_runs(tmp_path: Path, text: str) -> None:
    printed = _printed(tmp_path, one=ONE, broken=text)
    assert "1 error in" in printed
    assert "test_is_killed" not in printed
