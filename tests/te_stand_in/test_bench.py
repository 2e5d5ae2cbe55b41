"""`moepp bench layer --dtype fp8` compares two layers with Transformer Engine's experts."""

import pytest
from megatron.core.transformer.moe.moe_layer import MoELayer
from transformer_engine.pytorch.record import CALLS

from moepp_megatron.experts import ExpertLayout
from moepp_megatron.tools.bench import contestants
from moepp_megatron.tools.bench.contestants import Contestant
from moepp_megatron.tools.bench.layer import parts_ms
from moepp_megatron.tools.bench.shapes import PaperShape
from tests.te_stand_in.models import RECIPES

SHAPE = PaperShape("tiny", 32, 48, 2, ExpertLayout(4, num_constant_experts=2), 1.0, {})
TOKENS, TOPK = 64, 2


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("vanilla", [True, False], ids=["vanilla", "moepp"])
def test_both_layers_multiply_in_fp8(monkeypatch, vanilla, recipe):
    monkeypatch.setattr(contestants, "have_transformer_engine", lambda: True)
    layer = Contestant(SHAPE, 1.0, "fp8", TOKENS, vanilla=vanilla, fp8_recipe=recipe)
    assert layer.experts == "TEGroupedMLP"
    assert (type(layer.layer) is MoELayer) == vanilla
    # tau 1: half of the selections go to the 4 of 8 experts that are FFNs.
    rows = TOKENS * TOPK if vanilla else TOKENS * TOPK // 2
    assert layer.load.rows == rows
    assert layer.work["experts"].flops == 6 * rows * 32 * 48
    assert layer.work["experts"].dtype == "fp8"

    layer.forward_backward()
    assert {call.recipe for call in CALLS} == {RECIPES[recipe]}
    assert [sum(call.rows) >= rows for call in CALLS] == [True, True], "two grouped GEMMs"
    assert {rows % 16 for call in CALLS for rows in call.rows} == {0}
    CALLS.clear()
    parts = parts_ms(layer.layer, layer.forward_only, 2)
    assert {call.recipe for call in CALLS} == {RECIPES[recipe]}
    assert set(parts) - {"rest"} == set(layer.work)
