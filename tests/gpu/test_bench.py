"""The benchmarks on a card: what they compare and what they write. Times decide nothing here."""

import json
import sys

import pytest

from moepp_megatron.tools.bench.bounds import _card_obstacle, measure_card
from tests.commands import captured, succeeded

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]


def bench(tmp_path, *arguments):
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "moepp_megatron.cli.main", "bench", *arguments]
    succeeded(captured([*command, "--json", path], timeout=280))
    return json.loads(path.read_text())


def test_card():
    found = measure_card(("fp32", "bf16", "fp8"))
    assert found.device != "cpu"
    dtypes = {"fp32", "bf16", "fp8"} if _card_obstacle("fp8") is None else {"fp32", "bf16"}
    assert set(found.matmul_tflops) == dtypes


LAYER = ("layer", "--shapes", "0.6B", "--taus", "0.75", "--tokens", "2048", "--rounds", "3")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_layer(tmp_path, dtype):
    for record in bench(tmp_path, *LAYER, "--dtype", dtype):
        assert record["device"] != "cpu"
        assert set(record["moepp_bounds_ms"]) == set(record["moepp_parts_ms"]) - {"rest"}
        assert min(record["moepp_parts_ms"].values()) >= 0


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_layer_in_fp8(real_transformer_engine, tmp_path, recipe):
    """Both layers with Transformer Engine's grouped GEMM: the fair comparison."""
    for record in bench(tmp_path, *LAYER, "--dtype", "fp8", "--fp8-recipe", recipe):
        assert (record["vanilla_experts"], record["moepp_experts"]) == ("TEGroupedMLP",) * 2
        assert record["fp8_recipe"] == recipe
        assert record["matmul_tflops"] > 0
