"""Routing rules of other zero-computation models, as configurations of this layer."""

import importlib.util

import pytest

from tests.interop.models import build, layer_weights, settings

# fp32, one layer of small sums in another order.
FP32 = 1e-5

LONGCAT = {
    "num_ffn_experts": 6,
    "num_zero_experts": 0,
    "num_copy_experts": 3,
    "num_constant_experts": 0,
    "router_topk": 3,
    "gating_residual": False,
    "gate_normalization": "none",
    "selection_bias": True,
    "gate_scale": 6.0,
}
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs the package transformers"
)


def longcat_layers():
    """Outputs of our layer and of transformers' own, for the same weights and tokens."""
    import torch
    from transformers import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    (model,) = build(settings(moe=LONGCAT))
    ours = model.decoder.layers[0].mlp
    # Large enough to change which experts are selected.
    ours.router.expert_bias.copy_(torch.linspace(0.1, -0.1, 9))
    theirs = LongcatFlashMoE(
        LongcatFlashConfig(
            hidden_size=32,
            expert_ffn_hidden_size=48,
            n_routed_experts=6,
            zero_expert_num=3,
            moe_topk=3,
            routed_scaling_factor=6.0,
        )
    )
    expert_in, expert_out = layer_weights(ours)
    with torch.no_grad():
        theirs.router.classifier.weight.copy_(ours.router.weight)
        theirs.router.e_score_correction_bias.copy_(ours.router.expert_bias)
        theirs.experts.gate_up_proj[:6].copy_(expert_in)
        theirs.experts.down_proj.copy_(expert_out)
        x = torch.randn(16, 4, 32)
        return ours(x)[0].numpy(), theirs(x).numpy()


@needs_transformers
def test_longcat_flash_layer(on_one_rank):
    import numpy as np

    ours, theirs = on_one_rank(longcat_layers)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=FP32 * np.abs(theirs).max())


def bias_in_bf16_model():
    """The bias after a bf16 model has been wrapped, saved and loaded."""
    import torch
    from megatron.core.transformer.module import Float16Module

    raw = settings(moe=LONGCAT, precision={"dtype": "bf16"})
    (model,) = build(raw)
    router = model.decoder.layers[0].mlp.router
    value = torch.linspace(0, 1, 9) / 3
    Float16Module(model.config, model)
    model.load_state_dict({**model.state_dict(), "decoder.layers.0.mlp.router.expert_bias": value})
    assert torch.equal(router.expert_bias, value), "the bias was rounded"
    return router.expert_bias.dtype


def test_selection_bias_stays_fp32(ranks):
    import torch

    assert ranks(1).run(bias_in_bf16_model) == [torch.float32]


def test_bias_step_follows_the_published_rule():
    import torch

    from moepp_megatron.moe.budget import _bias_step

    # Half of the selections are wanted for two FFN experts, a quarter for each.
    shares = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.0, 0.25, 0.25, 0.5]])
    steps = _bias_step(shares, 0.5, 2, rate=0.1)
    torch.testing.assert_close(steps, torch.tensor([[-0.025, 0, 0, 0], [0.025, 0, 0, 0]]))
