"""`moepp bench`: results of tiny layers, and wrong usage."""

import json

import pytest

from moepp_megatron.config import UnfitError
from tests import commands


def test_layer_prints_tables_and_writes_json(tmp_path):
    # A process of its own: the command makes and destroys the default process group.
    command = ["bench", "layer"]
    command += ["--shapes", "0.6B", "--taus", "0.5", "--tokens", "32", "--rounds", "1"]
    command += ["--json", str(tmp_path / "r.json")]
    done = commands.moepp(*command)
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
        # Every part has its bound.
        assert set(record["moepp_bounds_ms"]) == set(record["moepp_parts_ms"]) - {"rest"}
        assert set(record["vanilla_bounds_ms"]) == set(record["vanilla_parts_ms"]) - {"rest"}
        passes = 1 if record["pass"] == "forward" else 3
        flops = passes * 6 * 64 * 768 * 2048  # K T rows of 32 tokens
        assert record["vanilla_tflops"] == pytest.approx(flops / record["vanilla_ms"] / 1e9)
        assert record["moepp_tflops"] == pytest.approx(flops / 2 / record["moepp_ms"] / 1e9)
        assert record["vanilla_experts"] == "SequentialMLP"
        assert min(record["matmul_tflops"], record["copy_gb_s"]) > 0
    assert "efficiency" in done.stdout
    assert "times its bound" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer", "--shapes", "0.7B"], "--shapes (0.7B) must be one of 0.6B, 1B, 2B, 7B"),
        (["layer", "--taus", "0.5,x"], "--taus (x) must be a number > 0"),
        (["layer", "--taus", "-1"], "--taus (-1) must be a number > 0"),
        (["layer", "--passes", "fwd"], "--passes (fwd) must be one of forward"),
        (
            ["layer", "--dtype", "bf1"],
            "--dtype (bf1) must be one of fp32, bf16, fp8; did you mean bf16",
        ),
        (["layer", "--shapes", ","], "--shapes (',') must name at least one"),
    ],
)
def test_wrong_usage(arguments, message, moepp):
    code, _, err = moepp("bench", *arguments)
    assert code == 2
    assert message in err


def test_fp8_is_refused_with_the_reason_where_it_cannot_run(monkeypatch, moepp):
    from moepp_megatron.runtime.fit import FP8Machine

    for machine, reason in (
        (FP8Machine(None, None, None), "must have Transformer Engine and a GPU, which this"),
        (FP8Machine((2, 20, 0), (8, 0), (13, 0)), "compute capability 8.9, not 8.0"),
    ):
        monkeypatch.setattr(FP8Machine, "this", classmethod(lambda cls, found=machine: found))
        code, _, err = moepp("bench", "layer", "--dtype", "fp8")
        assert code == UnfitError.exit_code
        assert err.startswith("error: --dtype (fp8) cannot be measured here: ")
        assert reason in err
        assert err.endswith("; use bf16\n")
