"""`moepp bench`: results of tiny layers, and wrong usage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moepp_megatron.cli.main import app
from moepp_megatron.config import ConfigError


def test_layer_writes_json_and_plot(tmp_path: Path) -> None:
    # A process of its own: the command makes and destroys the default process group.
    command = [sys.executable, "-m", "moepp_megatron.cli.main", "bench", "layer"]
    command += ["--shapes", "0.6B", "--taus", "0.5", "--tokens", "32", "--rounds", "1"]
    command += ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    records = json.loads((tmp_path / "r.json").read_text())
    assert [record["pass"] for record in records] == ["forward", "forward_backward"]
    for record in records:
        assert record["phi"] == pytest.approx(0.5)
        assert record["efficiency"] == pytest.approx(record["speedup"] * record["phi"])
        assert min(record["vanilla_ms"], record["moepp_ms"]) > 0
        # Half of the selections skip the FFN experts: so does what is kept of them.
        assert record["moepp_kept_bytes"] < 0.6 * record["vanilla_kept_bytes"]
        assert set(record["moepp_parts_ms"]) >= {"router", "experts", "zero_computation"}
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "efficiency" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer", "--shapes", "0.7B"], "--shapes (0.7B) must be one of 0.6B, 1B, 2B, 7B"),
        (["layer", "--taus", "0.5,x"], "--taus (x) must be a number > 0"),
        (["layer", "--taus", "-1"], "--taus (-1) must be a number > 0"),
        (["layer", "--passes", "fwd"], "--passes (fwd) must be one of forward"),
        (["layer", "--dtype", "bf1"], "--dtype (bf1) must be one of fp32, bf16; did you mean bf16"),
        (["layer", "--shapes", ","], "--shapes (',') must name at least one"),
        (["dispatch", "--experts", "7"], "--experts (7) must be divisible by the number of ranks"),
        (["dispatch", "--topk", "9"], "--topk (9) must be at most --experts (8)"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
