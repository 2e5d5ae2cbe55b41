"""Reading a file that grows, is cut and is replaced."""

import os

import pytest

from moepp_megatron.observe import tail
from moepp_megatron.observe.jsonl import JsonlSink
from moepp_megatron.observe.tail import Tail
from tests.unit.observe.conftest import write_steps


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So small that lines span several."""
    monkeypatch.setattr(tail, "CHUNK", 4)


def look(reader):
    """All that is new."""
    rewritten, lines = reader.poll()
    while further := reader.poll().lines:
        lines += further
    return rewritten, lines


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def test_lines_come_once_and_whole(path):
    reader = Tail(path)
    assert look(reader) == (False, [])
    assert reader.mtime is None
    append(path, "first\nsec")
    assert look(reader) == (False, [b"first"])
    assert look(reader) == (False, [])
    append(path, "ond\n\nthird\n")
    assert look(reader) == (False, [b"second", b"", b"third"])
    assert reader.mtime


def test_a_cut_half_line_is_not_seen(path):
    """A full disk leaves half a line, which its writer takes back."""
    reader = Tail(path)
    append(path, "one\ntw")
    assert look(reader) == (False, [b"one"])
    os.truncate(path, 4)
    append(path, "2\n")
    assert look(reader) == (False, [b"2"])


@pytest.mark.parametrize("content", ["", "one\n", "one\nnew\n", "ONE\ntwo\nmore\n"])
def test_a_file_cut_or_changed_in_place_starts_over(path, content):
    path.write_text("one\ntwo\n")
    reader = Tail(path)
    look(reader)
    with path.open("r+") as file:
        file.truncate()
        file.write(content)
    assert look(reader) == (True, content.encode().split(b"\n")[:-1])
    append(path, "next\n")
    assert look(reader) == (False, [b"next"])


def test_a_replaced_or_removed_file_starts_over(path):
    other = path.with_name("other")
    path.write_text("one\ntwo\n")
    reader = Tail(path)
    look(reader)
    other.write_text("one\ntwo\n")
    os.replace(other, path)
    assert look(reader) == (True, [b"one", b"two"])
    path.unlink()
    assert look(reader) == (True, [])
    assert look(reader) == (False, [])


def test_only_new_bytes_are_read(path, monkeypatch):
    path.write_text("x" * 100_000 + "\n")
    reader = Tail(path)
    look(reader)
    read = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: read.append(n) or real(fd, n, at))
    append(path, "new\n")
    assert reader.poll() == (False, [b"new"])
    assert sum(read) <= tail.FINGERPRINT + 4 * tail.CHUNK


def test_what_a_rollback_or_a_resume_undoes_is_dropped(path):
    sink = JsonlSink(path)
    write_steps(sink, 1, 2, 3)
    reader = Tail(path)
    assert len(look(reader)[1]) == 3
    sink.go_back(1)
    write_steps(sink, 2, 3, loss=7.0)
    rewritten, lines = look(reader)
    assert rewritten
    assert [b'"loss":7.0' in line for line in lines] == [False, True, True]
    JsonlSink(path, resume_step=2).close()
    rewritten, lines = look(reader)
    assert rewritten
    assert len(lines) == 1
