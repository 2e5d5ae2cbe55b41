import errno
import fcntl
import os
import threading

import pytest

from moepp_megatron.config import UnfitError
from moepp_megatron.runtime import atomic
from moepp_megatron.runtime.atomic import (
    create_atomic,
    lock,
    partial_folder,
    publish,
    whole_file,
    write_atomic,
)
from tests.full_disk import torch_error
from tests.refusals import config_error


def write(out, text):
    with partial_folder(out) as partial:
        (partial / "file").write_text(text)
        publish(partial, out)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_folder_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "exchange", lambda first, second: False)
    out = tmp_path / "parent/out"
    write(out, "old")
    write(out, "new")
    assert (out / "file").read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_exchange_swaps_two_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not atomic.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    assert (tmp_path / "a/b").exists()
    assert (tmp_path / "b/a").exists()


FULL = r"out cannot be written: No space left on device after 3.0 MiB, .*; free space or"


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (RuntimeError, pytest.raises(RuntimeError)),
        (torch_error, pytest.raises(UnfitError, match=FULL)),
    ],
    ids=["any", "full disk"],
)
def test_failure_leaves_the_old_folder(tmp_path, error, refusal):
    """And a full disk is one line."""
    out = tmp_path / "out"
    write(out, "old")

    def fail_halfway():
        with partial_folder(out) as partial:
            (partial / "file").write_bytes(bytes(3 << 20))
            raise error()

    with refusal:
        fail_halfway()
    assert (out / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_one_writers_where_the_file_system_has_locks(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with partial_folder(out), config_error("written by another process"):
        write(out, "new")
    no_locks = OSError(errno.ENOSYS, "Function not implemented")

    def flock(*arguments):
        raise no_locks

    monkeypatch.setattr(fcntl, "flock", flock)
    write(out, "new")
    assert (out / "file").read_text() == "new"


def test_who_waits_for_a_lock_gets_it_when_it_is_free(tmp_path):
    holder, other = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    try:
        assert lock(holder, waits=True)
        assert not lock(other)
        answers = []
        waiter = threading.Thread(
            target=lambda: answers.append(lock(other, waits=True)), daemon=True
        )
        waiter.start()
        waiter.join(0.2)
        assert waiter.is_alive()
    finally:
        os.close(holder)
    waiter.join(30)
    assert answers == [True]
    os.close(other)


def test_a_failed_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def refuse(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk gone"):
        write_atomic(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_follows_the_umask_and_keeps_its_suffix_while_it_is_written(tmp_path):
    path = tmp_path / "trace.json.gz"
    with whole_file(path) as temporary:
        assert temporary.name.startswith(".trace.json.gz.")
        assert temporary.suffix == ".gz"
        temporary.write_bytes(b"whole")
        assert not path.exists()
    plain = tmp_path / "plain"
    plain.touch()
    assert path.read_bytes() == b"whole"
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_folder_that_cannot_be_made_is_called_as_the_user_does(tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file/out"
    refused = config_error(r"^DST \(.*out\) cannot be written")
    with refused, partial_folder(out, "DST"):
        pass


def test_a_file_that_is_there_is_not_created_again(tmp_path, monkeypatch):
    create_atomic(tmp_path / "file", b"first")
    with pytest.raises(FileExistsError):
        create_atomic(tmp_path / "file", b"second")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"first"}

    def no_links(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    create_atomic(tmp_path / "other", b"third")
    assert (tmp_path / "other").read_bytes() == b"third"
