"""Tiny MoE++ layers and models for one process, their reference, and how to compare the two."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.model.initialize import initialize_weights
from moepp_megatron.model.local_modules import fit_local_modules
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.reference import ReferenceMoEPP
from moepp_megatron.moe.spec import get_moepp_block_spec, get_moepp_layer_spec
from moepp_megatron.moe.upstream_versions import TESTED_VERSION, version

tested_version_only = pytest.mark.skipif(
    version() != TESTED_VERSION, reason="refused with another megatron-core than the tested one"
)

HIDDEN = 16
FFN_HIDDEN = 24
VOCAB = 64
SEQUENCE = 12
# By their formulas, for fp64.
DEFINED_SCORES = {
    "softmax": lambda z: z.exp() / z.exp().sum(-1, keepdim=True),
    "sigmoid": lambda z: 1.0 / (1.0 + (-z).exp()),
    "sqrtsoftplus": lambda z: z.exp().log1p().sqrt(),
}


def of_kinds(experts, topk, **changes):
    """Settings with so many FFN, zero, copy and constant experts."""
    ffn, zero, copy, constant = experts
    return MoEPPConfig(
        ffn,
        num_zero_experts=zero,
        num_copy_experts=copy,
        num_constant_experts=constant,
        router_topk=topk,
        **changes,
    )


def megatron_config(moepp, **changes):
    """megatron-core's settings around `moepp`, smallest sizes, everything else as in training."""
    settings = {
        "num_layers": 3,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "ffn_hidden_size": FFN_HIDDEN,
        "moe_ffn_hidden_size": FFN_HIDDEN,
        "num_moe_experts": moepp.num_ffn_experts,
        "moe_router_topk": moepp.router_topk,
        "moe_token_dispatcher_type": "alltoall",
        # As `model/megatron_config.py` sets it.
        "moe_router_load_balancing_type": "global_aux_loss"
        if moepp.balance_scope == "global"
        else "none",
        # megatron-core demands it of top-1 routing.
        "moe_router_pre_softmax": moepp.router_topk == 1,
        "moe_router_dtype": "fp32",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "perform_initialization": False,
        "use_cpu_initialization": True,
        "calculate_per_token_loss": True,
        "hetereogenous_dist_checkpoint": True,
    }
    return TransformerConfig(**(settings | changes))


def build_transformer_layer(moepp, has_residual=True, layer_number=2, **changes):
    config = megatron_config(moepp, **changes)
    spec = get_moepp_layer_spec(
        config,
        moepp,
        use_transformer_engine=False,
        has_residual=has_residual,
        adapt=fit_local_modules,
    )
    return build_module(spec, config=config, layer_number=layer_number)


def build_layer(
    moepp,
    has_residual=True,
    dispatcher="alltoall",
    device=None,
    use_transformer_engine=False,
    **changes,
):
    """The MoE++ layer alone, from its spec, with random weights; `dispatcher` as `moe.dispatcher`.

    The transformer layer around it is not built: attention is not under test and costs time.
    Weights do not depend on the device.
    """
    if dispatcher == "alltoall_dedup":
        dispatcher = "alltoall"
        moepp = dataclasses.replace(moepp, deduplicate_dispatch=True)
    config = megatron_config(moepp, moe_token_dispatcher_type=dispatcher, **changes)
    spec = get_moepp_layer_spec(
        config, moepp, use_transformer_engine=use_transformer_engine, has_residual=has_residual
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = spec.submodules.mlp(config=config, pg_collection=groups, is_mtp_layer=False)
    layer.set_layer_number(2)
    layer.cpu()
    randomize(layer)
    return layer if device is None else layer.to(device)


@torch.no_grad()
def randomize(module, std=0.3):
    """Weights large enough that routing differs from token to token."""
    for parameter in module.parameters():
        parameter.normal_(std=std)


def build_model(moepp, seed=7, rope_scaling=False, **changes):
    config = megatron_config(moepp, **changes)
    spec = get_moepp_block_spec(
        config, moepp, use_transformer_engine=False, adapt=fit_local_modules
    )
    model = MoEPPGPTModel(
        config,
        spec,
        moepp=moepp,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        rope_scaling=rope_scaling,
    )
    initialize_weights([model], seed)
    return model


def token_losses(model, tokens, **masks):
    """[b, s] cross entropy of `tokens` [b, s + 1]."""
    length = tokens.shape[1] - 1
    positions = torch.arange(length).expand(tokens.shape[0], -1)
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return model(ids, positions, None, labels=labels, **masks)


def reference_of(layer):
    """The reference with the layer's weights, in fp32, on its device."""
    reference = ReferenceMoEPP(
        layer.moepp, HIDDEN, FFN_HIDDEN, has_residual=layer.router.residual_weight is not None
    )
    with torch.no_grad():
        for _, ours, theirs in parameter_pairs(layer, reference):
            theirs.copy_(ours)
    return reference.to(layer.router.weight.device)


def parameter_pairs(layer, reference):
    """(name, the layer's parameter, the reference's) for every parameter."""
    return _pairs(layer, reference, gradients=False)


def gradient_pairs(layer, reference):
    """(name, the layer's gradient, the reference's) for every parameter."""
    return _pairs(layer, reference, gradients=True)


def _pairs(layer, reference, gradients):
    def value(parameter):
        if not gradients:
            return parameter
        assert parameter.grad is not None, "a parameter got no gradient"
        return parameter.grad

    router = layer.router
    weights = [("router.weight", router.weight, reference.gate_weights[0])]
    if layer.moepp.two_layer_gate:
        weights.append(("router.output_weight", router.output_weight, reference.gate_weights[1]))
    if router.residual_weight is not None:
        weights.append(
            ("router.residual_weight", router.residual_weight, reference.residual_weight)
        )
    if layer.moepp.num_constant_experts > 0:
        own = layer.zero_computation
        weights.append(("constants", own.constants, reference.constants))
        weights.append(("mixing_weight", own.mixing_weight, reference.mixing_weight))
    for name, ours, theirs in weights:
        yield name, value(ours), value(theirs)
    for part, theirs in (("linear_fc1", reference.expert_in), ("linear_fc2", reference.expert_out)):
        for index, ours in enumerate(_expert_weights(layer, part)):
            yield f"experts.{index}.{part}", value(ours), value(theirs)[index]


def _expert_weights(layer, part):
    """Of every expert: modules of their own, or Transformer Engine's grouped ones."""
    experts = layer.experts
    if hasattr(experts, "local_experts"):
        return [getattr(expert, part).weight for expert in experts.local_experts]
    grouped = getattr(experts, part)
    return [getattr(grouped, f"weight{i}") for i in range(layer.num_local_experts)]


def assert_close(actual, expected, what, tolerance=1e-5):
    """Largest error at most `tolerance` times the largest expected value; zeros match exactly.

    1e-5: both sides run in fp32 (unit roundoff 6e-8) over sums of a few hundred terms.
    """
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    error = (actual.double() - expected.double()).abs().max().item()
    limit = tolerance * expected.abs().max().item()
    assert error <= limit, f"{what}: error {error:.3g}, allowed {limit:.3g}"
