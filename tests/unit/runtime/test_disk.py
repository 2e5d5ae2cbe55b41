"""The meaning of a failed write, and the space on a disk."""

import errno
from pathlib import Path

import pytest

from moepp_megatron.runtime import disk
from tests.full_disk import torch_error


def test_torch_hides_a_full_disk_and_it_is_found():
    error = torch_error()
    assert not isinstance(error, OSError)
    assert disk.is_full(error)
    told = disk.write_error(error, Path("/data/file"))
    assert str(told) == "[Errno 28] No space left on device: '/data/file'"
    assert told.errno == errno.ENOSPC


def test_another_failure_keeps_its_name():
    error = ValueError("no such dtype")
    assert disk._refusal(error) is None
    assert not disk.is_full(error)
    assert str(disk.write_error(error, Path("/data/file"))) == (
        "/data/file: ValueError: no such dtype"
    )


def test_a_quota_is_a_full_disk_and_a_missing_file_is_none():
    assert disk.is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not disk.is_full(FileNotFoundError(errno.ENOENT, "No such file or directory"))


def test_errors_that_are_each_others_cause_end():
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert disk._refusal(first) is None


def test_room_of_a_folder_that_is_still_to_be_made(tmp_path):
    # Other processes write to the same disk meanwhile; a factor leaves room for them.
    there, to_be_made = disk.free_bytes(tmp_path), disk.free_bytes(tmp_path / "a/b")
    assert there / 2 < to_be_made < there * 2


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.0 MiB"), (12 << 20, "12.0 MiB"), (3 << 40, "3,072.0 GiB")]
)
def test_bytes_for_people(count, text):
    assert disk.show_bytes(count) == text
