"""The leftovers of killed saves are removed; the files of a living process are not."""

import os
import socket
import subprocess
import sys

import pytest

from moepp_megatron.training.checkpoint.retention import incomplete_name, remove_leftovers


@pytest.fixture
def living():
    """The number of another process of this machine."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid


def _leave(folder, owner):
    path = folder / f".step_00000005.incomplete-{owner}"
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(b"half")
    return path


def test_what_a_living_process_writes_stays(tmp_path, living):
    path = _leave(tmp_path, f"{socket.gethostname()}-{living}-ab12")
    remove_leftovers(tmp_path)
    assert path.is_dir()


def test_a_number_that_was_given_out_again_is_no_owner(tmp_path, living):
    path = _leave(tmp_path, f"{socket.gethostname()}-{living}-ab12")
    os.utime(path, (1.0, 1.0))
    remove_leftovers(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize("owner", ["{host}-{dead}-ab12", "other-host-1-ab12", "ab12", "{host}-x-1"])
def test_what_nobody_writes_goes(tmp_path, dead, owner):
    path = _leave(tmp_path, owner.format(host=socket.gethostname(), dead=dead))
    (tmp_path / ".step_00000003.discarded-ab").mkdir()
    (tmp_path / "step_00000004").mkdir()
    remove_leftovers(tmp_path)
    assert not path.exists()
    assert [left.name for left in tmp_path.iterdir()] == ["step_00000004"]


def test_an_own_folder_is_a_leftover_once_it_is_no_longer_written(tmp_path):
    # A run removes leftovers when it has nothing under way.
    (tmp_path / incomplete_name("step_00000005")).mkdir()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []
