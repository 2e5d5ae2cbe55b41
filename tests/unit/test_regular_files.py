"""A path that is no regular file is refused in one line and never opened: a pipe would block."""

import os
from pathlib import Path

import pytest

from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.interop.score import _read_input_ids, text_of
from moepp_megatron.observe.metrics import MetricsError, read_metrics
from moepp_megatron.observe.status import RunStatus
from moepp_megatron.observe.tail import Tail
from moepp_megatron.tools.planning.measured.rows import read_runs
from tests.refusals import config_error
from tests.unit.tools.report.conftest import synthetic_config, synthetic_records, write_run


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def run(tmp_path):
    config = synthetic_config()
    return write_run(tmp_path / "run", config, synthetic_records(config, steps=3))


def test_regular_files_and_links_to_them_pass(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    check_regular(tmp_path / "file")
    check_regular(tmp_path / "link")
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        check_regular(tmp_path)
    with pytest.raises(OSError, match="Not a regular file"):
        check_regular(Path("/dev/zero"))


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_files_that_options_name_are_regular(kind, pipe):
    given = pipe if kind == "pipe" else Path(kind)
    for read, option in (
        (text_of, "--text"),
        (_read_input_ids, "--tokens"),
        (read_runs, "--measured"),
    ):
        with config_error(rf"{option} \({given}\) .*Not a regular file"):
            read(given)


def test_readers_refuse_a_pipe(pipe, tmp_path):
    with pytest.raises(MetricsError, match="Not a regular file"):
        read_metrics(pipe)
    with pytest.raises(OSError, match="Not a regular file"):
        Tail(pipe).poll()
    os.mkfifo(tmp_path / "status.json")
    assert RunStatus.read(tmp_path) is None


@pytest.fixture
def refused(moepp):
    """The line with which a command refuses its arguments."""

    def call(*words):
        code, _, printed = moepp(*words)
        assert (code, printed.count("\n")) == (2, 1), printed
        return printed

    return call


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_commands_refuse_a_pipe_or_a_device_in_one_line(kind, pipe, tmp_path, refused):
    given = pipe if kind == "pipe" else Path(kind)
    (tmp_path / "a.yaml").write_text(f"base: {given}\n")
    (tmp_path / "a.txt").write_text("text")
    prepare = ("data", "prepare", tmp_path / "a.txt", "--out", tmp_path / "out")
    chat = ("--chat", "--seq-length", "8", "--tokenizer")
    for words in (
        ("config", "show", given),
        ("config", "show", tmp_path / "a.yaml"),
        ("config", "from-megatron", given),
        ("data", "prepare", given, "--out", tmp_path / "out"),
        (*prepare, "--tokenizer", given),
        (*prepare, *chat, given),
    ):
        line = refused(*words)
        assert "regular file" in line or "neither a file nor a folder" in line
        assert str(given) in line


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "alerts.jsonl"])
def test_a_run_with_a_pipe_for_a_file_is_no_run(name, run, refused):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert "Not a regular file" in refused("report", run)
    assert "Not a regular file" in refused("monitor", run, "--once")
