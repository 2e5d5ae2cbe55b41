"""The tests in tests/gpu, tested without a GPU: what a CPU and the stand-in can stand for."""

import os
import sys

import pytest

from tests import ROOT
from tests.commands import captured, forked


def run(*arguments, stand_in=False):
    path = [str(ROOT / "tests/te_stand_in")] if stand_in else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]),
        "MOEPP_TESTS_CARD": "cpu",
        "MOEPP_TE_STAND_IN": str(int(stand_in)),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["--tb=short", "--show-capture=no", *arguments]
    done = captured(command, cwd=ROOT, env=environment, timeout=999)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def reasons(output):
    """Why tests were skipped."""
    return {line.rsplit(": ", 1)[1] for line in output.splitlines() if "SKIPPED" in line}


def test_training_and_telemetry():
    """Five steps on a rank of their own; telemetry on recorded answers."""
    output = run("tests/gpu/test_training.py", "tests/gpu/test_nvml.py", "-k", "not two_cards")
    assert "4 passed" in output
    assert reasons(output) == {"needs a CUDA GPU", "needs Transformer Engine"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_recipe_on_the_stand_in():
    assert "skipped" not in run("tests/gpu/test_fp8.py", stand_in=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_ranks():
    """Every layout, and FP8 on a rank without a row."""
    chosen = ("tests/gpu/test_training.py", "-k", "two_cards or without_a_row")
    assert "skipped" not in run(*chosen, stand_in=True)


def test_each_says_what_it_needs():
    """Collected everywhere, skipped with the reason."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = forked(command, ROOT, os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout[-4000:]
    assert reasons(done.stdout) == {"needs a CUDA GPU"}
    assert "passed" not in done.stdout
