"""Places that cannot be written: each command says so in one line, before it works for them."""

import subprocess

import pytest
import yaml

from moepp_megatron.data import prepared_data
from moepp_megatron.runtime import launch
from tests.unit.cli.test_dry_run import MINIMAL
from tests.unit.tools.report.conftest import synthetic_config, synthetic_records, write_run


@pytest.fixture
def read_only(small_disk):
    """A file system that holds a run and is mounted read-only, which root heeds too."""
    config = synthetic_config()
    write_run(small_disk / "old", config, synthetic_records(config, 5))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    return small_disk


@pytest.fixture
def refused(moepp, monkeypatch):
    """Runs a command that is to end with status 2 and a line; returns the line."""
    monkeypatch.setattr(launch, "run_ranks", lambda *args: pytest.fail("ranks were started"))
    monkeypatch.setattr(prepared_data, "check_data", lambda config, whole_index: [])

    def call(*words):
        code, out, err = moepp(*words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        return err

    return call


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize(
    ("name", "option"),
    [(".", []), ("run", []), ("a/run", []), ("old", ["--resume"]), ("old", ["--overwrite"])],
)
def test_run_dir(read_only, refused, config, name, option):
    run = read_only / name
    said = refused("train", config, f"run.dir={run}", "--nproc", "2", *option)
    assert said.startswith(
        f"error: run.dir ({run}) must be a folder that can be written (Read-only file system"
    )


def test_checkpoint_dir(read_only, refused, config, tmp_path):
    words = [f"run.dir={tmp_path / 'run'}", f"checkpoint.dir={read_only / 'c'}"]
    assert refused("train", config, *words, "--nproc", "2") == (
        f"error: checkpoint.dir ({read_only / 'c'}) must be a folder that can be written (Read-only"
        f" file system at {read_only}); make it writable, or choose another checkpoint.dir\n"
    )


def test_report(read_only, refused):
    page = read_only / "old/report.html"
    said = refused("report", read_only / "old")
    assert said.startswith(f"error: {page}: cannot be written (Read-only file system)")


def test_data_is_not_read(read_only, refused, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text " * 100)
    monkeypatch.setattr(
        "moepp_megatron.data.prepare.content_fingerprint", lambda *_: pytest.fail("was read")
    )
    said = refused("data", "prepare", tmp_path / "a.txt", "--out", read_only / "data")
    assert said.startswith(f"error: --out ({read_only / 'data'}) cannot be written (Read-only")


@pytest.mark.parametrize("option", ["--json", "--out"])
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("disk/x", "Read-only file system"),
        ("disk/a/x", "Read-only file system"),
        ("config.yaml/x", "config.yaml is a file"),
        ("disk", "Is a directory"),
    ],
)
def test_files_to_write_are_looked_at_first(read_only, refused, config, option, place, reason):
    path = config.parent / place
    said = refused("plan", config, option, path)
    assert said.startswith(f"error: {option} ({path}) must be a file that can be written (")
    assert f"{reason}); name another one" in said


def test_folders_of_a_file_are_made(config, tmp_path, moepp):
    files = {option: tmp_path / "new" / option / "x.yaml" for option in ("--json", "--out")}
    words = [word for pair in files.items() for word in pair]
    assert moepp("plan", config, "--gpus", "1", *words)[0] == 0
    assert all(yaml.safe_load(path.read_text()) for path in files.values())
