"""The rows of FP8 experts: filled up on the experts' rank, and nowhere else."""

import pytest
import torch

from tests.te_stand_in.experts import HIDDEN, TOKENS, layer_of, routing_to, run
from tests.te_stand_in.models import EXPERTS, RECIPES, calls_of, config_of
from tests.unit.moe.test_layer_against_reference import DISPATCHERS


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("counts", "padded"),
    [
        ([5, 0, 17, 16], (16, 0, 32, 16)),
        ([16, 16, 16, 16], (16, 16, 16, 16)),
        ([0, 0, 0, 1], (0, 0, 0, 16)),
        # The GEMMs still run, or ranks with tokens would wait.
        ([0, 0, 0, 0], (0, 0, 0, 0)),
    ],
    ids=str,
)
def test_experts_alone_fill_up_their_rows(recipe, dispatcher, counts, padded):
    layer = layer_of(recipe, dispatcher)
    seen = run(layer, routing_to(counts), torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16))
    # What the dispatcher carries and counts are the selections that the router made ...
    assert (seen.rows, seen.by_expert) == (sum(counts), counts)
    # ... and both GEMMs see each expert's rows filled up to a multiple of 16.
    for module in EXPERTS:
        (call,) = calls_of(module)
        assert (call.rows, call.recipe) == (padded, RECIPES[recipe])


def test_padding_by_the_router_is_refused():
    from moepp_megatron.model.megatron_config import moepp_config, transformer_config
    from moepp_megatron.moe.spec import get_moepp_layer_spec

    config = config_of("delayed")
    megatron, moepp = transformer_config(config), moepp_config(config)
    megatron.moe_router_padding_for_quantization = True
    with pytest.raises(ValueError, match="not supported by the MoE\\+\\+ layer, because padding"):
        get_moepp_layer_spec(megatron, moepp, use_transformer_engine=True)
