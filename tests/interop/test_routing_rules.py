"""Routing rules of other zero-computation models, as configurations of this layer."""

import importlib.util
from typing import Any

import pytest

from tests.interop.models import build, layer_weights, settings
from tests.parallel.ranks import RankPools

# fp32, one layer of small sums in another order.
FP32 = 1e-5

LONGCAT: dict[str, Any] = {
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


def longcat_layers() -> tuple[Any, Any]:
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
def test_longcat_flash_layer(ranks: RankPools) -> None:
    import numpy as np

    ((ours, theirs),) = ranks(1).run(longcat_layers)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=FP32 * np.abs(theirs).max())


def bias_alone_selects() -> tuple[Any, Any, Any]:
    """Routing of the same tokens without and with a bias towards expert 0."""
    import torch

    (model,) = build(settings(moe=LONGCAT))
    router = model.decoder.layers[0].mlp.router
    x = torch.randn(16, 4, 32)
    with torch.no_grad():
        logits = router(x).logits
        router.expert_bias[0] = 2.0
        biased = router(x)
    return torch.softmax(logits, -1).view(-1, 9).numpy(), biased.gates.numpy(), biased.routing_map


def test_selection_bias_selects_but_does_not_weigh(ranks: RankPools) -> None:
    import numpy as np

    ((scores, gates, routing_map),) = ranks(1).run(bias_alone_selects)
    assert routing_map[:, 0].all()
    np.testing.assert_allclose(gates[:, 0], 6.0 * scores[:, 0], rtol=FP32)


def bias_in_bf16_model() -> Any:
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


def test_selection_bias_stays_fp32(ranks: RankPools) -> None:
    import torch

    assert ranks(1).run(bias_in_bf16_model) == [torch.float32]


def reference_with_bias() -> None:
    """The readable definition agrees on selection bias and gate scale."""
    import torch

    from moepp_megatron.moe.reference import ReferenceMoEPP

    (model,) = build(settings(moe={**LONGCAT, "num_constant_experts": 2}))
    ours = model.decoder.layers[0].mlp
    bias = torch.linspace(0.1, -0.1, 11)
    ours.router.expert_bias.copy_(bias)
    reference = ReferenceMoEPP(ours.moepp, 32, 48, has_residual=False)
    reference.selection_bias_E = bias
    expert_in, expert_out = layer_weights(ours)
    with torch.no_grad():
        reference.gate_weights[0].copy_(ours.router.weight)
        reference.expert_in.copy_(expert_in)
        reference.expert_out.copy_(expert_out)
        reference.constants.copy_(ours.zero_computation.constants)
        reference.mixing_weight.copy_(ours.zero_computation.mixing_weight)
        x = torch.randn(16, 4, 32)
        expected = reference(x.view(-1, 32))
        torch.testing.assert_close(
            ours(x)[0].view(-1, 32), expected.hidden_TD, rtol=FP32, atol=FP32 * 10
        )


def test_reference_with_selection_bias_and_gate_scale(ranks: RankPools) -> None:
    ranks(1).run(reference_with_bias)


def test_bias_step_follows_the_published_rule() -> None:
    import torch

    from moepp_megatron.moe.budget import bias_step

    # Half of the selections are wanted for two FFN experts, a quarter for each.
    shares = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.0, 0.25, 0.25, 0.5]])
    steps = bias_step(shares, 0.5, 2, rate=0.1)
    torch.testing.assert_close(steps, torch.tensor([[-0.025, 0, 0, 0], [0.025, 0, 0, 0]]))
