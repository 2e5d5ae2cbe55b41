"""Runs tests/te_stand_in in a process in which megatron-core finds the stand-in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(900)
def test_fp8_with_a_stand_in_of_transformer_engine():
    """Specs, padding, contexts, FP8 weights and checkpoints; the output names what failed."""
    folder = ROOT / "tests/te_stand_in"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "MOEPP_TE_STAND_IN": "1",
        # On a machine with a GPU too, these are CPU tests.
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", str(folder), "-q", "-p", "no:cacheprovider"]
    command += ["--tb=short", "--show-capture=no", "-W", "ignore"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=840
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
