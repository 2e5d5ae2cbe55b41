"""`moepp profile` as a user calls it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moepp_megatron.cli.main import app
from moepp_megatron.config import ConfigError

SAMPLE = Path(__file__).parents[1] / "profiling/samples/kineto_nccl"


@pytest.fixture
def run(tmp_path):
    """A folder of a run with a recording."""
    shutil.copytree(SAMPLE, tmp_path / "run/profile")
    return tmp_path / "run"


def command(*arguments):
    return CliRunner().invoke(app, ["profile", *map(str, arguments)], catch_exceptions=True)


def test_the_terminal_and_the_json_say_the_same(run):
    result = command(run, "--json", run / "numbers.json")
    assert result.exit_code == 0, result.output
    numbers = json.loads((run / "numbers.json").read_text())
    assert numbers["critical_rank"] == 1
    assert "most often for rank 1" in " ".join(result.output.split())
    for title in ("Collectives: ", "All-to-all of hidden vectors: ", "Ranks: milliseconds"):
        assert title in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "training.profile_steps"),
        (["run", "--step", 9], r"--step \(9\).*use one of \[7\]"),
        (["run", "--json", "run/profile/rank0.meta.json"], "--json"),
    ],
)
def test_mistakes(run, monkeypatch, arguments, words):
    monkeypatch.chdir(run.parent)
    error = command(*arguments).exception
    assert isinstance(error, ConfigError)
    assert error.exit_code == 2
    assert re.search(words, str(error))
    assert "\n" not in str(error)
