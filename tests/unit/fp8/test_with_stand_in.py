"""Runs tests/te_stand_in, and some of tests/gpu, in a process in which megatron-core finds it."""

import os
import sys

import pytest

from tests import ROOT
from tests.commands import captured

# Layers; of FP8 one recipe, for the stand-in rounds in all of them alike. On a CPU no kernel is
# chosen by itself, and tests/unit/moe has every setting.
GPU_TESTS = "test_layer.py and not auto and not every_setting or tensorwise or documents or moments"


@pytest.mark.timeout(1800)
def test_fp8_with_a_stand_in_of_transformer_engine():
    """Specs, padding, contexts, FP8 weights and checkpoints; the output names what failed."""
    folder = ROOT / "tests/te_stand_in"
    gpu = [f"tests/gpu/test_{name}.py" for name in ("layer", "fp8", "documents", "moments")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "MOEPP_TE_STAND_IN": "1",
        "MOEPP_TESTS_CARD": "cpu",
        # On a machine with a GPU too, these are CPU tests.
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", str(folder), *gpu, "-q", "-p", "no:cacheprovider"]
    command += ["-k", f"te_stand_in or {GPU_TESTS}"]
    command += ["--tb=short", "--show-capture=no", "-W", "ignore"]
    result = captured(command, cwd=ROOT, env=environment, timeout=1740)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
