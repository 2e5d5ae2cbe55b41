"""Runs tests/te_stand_in, and what it can stand for of tests/gpu, where the stand-in is found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STAND_IN = "tests/te_stand_in"
GPU = [f"tests/gpu/test_{name}.py" for name in ("layer", "fp8", "documents", "moments")]
# On a CPU no kernel is chosen by itself, tests/unit/moe has every setting of the layer, and the
# stand-in rounds in all recipes alike.
CHOSEN = (
    "te_stand_in or test_layer.py and not auto and not every_setting "
    "or test_fp8.py and tensorwise or test_documents or test_moments"
)


@pytest.mark.timeout(900)
def test_fp8_with_a_stand_in_of_transformer_engine():
    """Specs, padding, contexts, FP8 weights and checkpoints; the output names what failed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / STAND_IN), str(ROOT)]),
        "MOEPP_TE_STAND_IN": "1",
        "MOEPP_TESTS_CARD": "cpu",
        # On a machine with a GPU too, these are CPU tests.
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", STAND_IN, *GPU, "-q", "-p", "no:cacheprovider"]
    command += ["-k", CHOSEN, "--tb=short", "--show-capture=no", "-W", "ignore"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
