"""`moepp doctor` on two ranks: one answer for all of them, with its exit code."""

import json

import pytest

from tests.commands import moepp

pytestmark = pytest.mark.parallel


def test_two_ranks_answer_once_and_measure_together(tmp_path):
    """A GPU count that no machine of this kind has makes it an error, which must come through."""
    out = tmp_path / "doctor.json"
    words = ("--nproc", 2, "--preflight", "--gpus", 999, "--json", out)
    done = moepp("doctor", *words, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "GPU count" in errors[0]
    assert "must be 999" in errors[0]
    findings = json.loads(out.read_text())["findings"]
    checks = [finding["check"] for finding in findings]
    assert {"matrix product", "slowest rank", "all-reduce", "all-to-all"} <= set(checks)
    # One node: its own checks stand there once, whatever the number of ranks.
    assert checks.count("megatron-core") == checks.count("Python") == 1
