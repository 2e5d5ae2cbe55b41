"""`moepp profile` as a user calls it."""

import json
import re
import shutil
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parents[1] / "profiling/samples/kineto_nccl"


@pytest.fixture
def run(tmp_path):
    """A folder of a run with a recording."""
    shutil.copytree(SAMPLE, tmp_path / "run/profile")
    return tmp_path / "run"


def test_the_terminal_and_the_json_say_the_same(run, moepp):
    code, out, err = moepp("profile", run, "--json", run / "numbers.json")
    assert code == 0, err
    numbers = json.loads((run / "numbers.json").read_text())
    assert numbers["critical_rank"] == 1
    assert "most often for rank 1" in " ".join(out.split())
    for title in ("Collectives: ", "All-to-all of hidden vectors: ", "Ranks: milliseconds"):
        assert title in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "training.profile_steps"),
        (["run", "--step", 9], r"--step \(9\).*use one of \[7\]"),
        (["run", "--json", "run/profile/rank0.meta.json"], "--json"),
    ],
)
def test_mistakes(run, monkeypatch, moepp, arguments, words):
    monkeypatch.chdir(run.parent)
    code, _, err = moepp("profile", *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert re.search(words, err)
