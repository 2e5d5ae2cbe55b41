"""MoE++ layers in patterns of Megatron-LM's `pretrain_hybrid.py`."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec

from moepp_megatron.interop import megatron_lm
from moepp_megatron.model.megatron_config import transformer_config
from moepp_megatron.moe.spec import with_submodules
from tests.te_stand_in.models import SEQUENCE, VOCAB, config_of, losses, model_of

WHOLE = config_of(None, model={"num_layers": 2}, precision={"dtype": "fp32"})


class Mixer(MegatronModule):
    """In the place of a Mamba layer, whose kernels need a GPU: the mean of the tokens so far."""

    def __init__(self, config, layer_number, **_):
        super().__init__(config)
        self.layer_number = layer_number
        self.weight = torch.nn.Parameter(torch.randn(config.hidden_size))

    def forward(self, hidden_states, **_):
        tokens = torch.arange(1, len(hidden_states) + 1).view(-1, 1, 1)
        return hidden_states + self.weight * hidden_states.cumsum(0) / tokens


def hybrid(monkeypatch, pattern, **changes):
    """The model that `hybrid_builder` of Megatron-LM builds with our spec."""
    args = SimpleNamespace(hybrid_layer_pattern=pattern)
    monkeypatch.setattr(megatron_lm, "get_args", lambda: args)
    config = copy.copy(transformer_config(WHOLE))
    vars(config).update(
        num_layers=len(pattern),
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=WHOLE.moe.balance_coeff,
        perform_initialization=True,
    )
    vars(config).update(changes)
    return HybridModel(
        config,
        with_submodules(megatron_lm.moepp_hybrid_spec, mamba_layer=ModuleSpec(module=Mixer)),
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
        rotary_base=WHOLE.model.rotary_base,
    )


def half_names(name):
    """The name in `*E*E` of a parameter of two whole layers."""

    def half(found):
        layer, module = found.groups()
        return f"layers.{2 * int(layer) + (module != 'self_attention')}.{module}"

    name = name.replace("final_layernorm", "final_norm")
    return re.sub(r"layers\.(\d)\.(\w+)", half, name)


def test_halves_compute_what_whole_layers_do(monkeypatch):
    whole, halves = model_of(WHOLE), hybrid(monkeypatch, "*E*E")
    assert halves.decoder.layers[1].mlp.moepp == whole.moepp
    halves.load_state_dict({half_names(name): value for name, value in whole.state_dict().items()})
    # The first pass gives megatron-core's log of balance losses its number of layers.
    found, expected = losses(halves), losses(whole)
    assert torch.equal(found, expected)
    expected.sum().backward()
    found.sum().backward()
    gradients = {name: parameter.grad for name, parameter in halves.named_parameters()}
    for name, parameter in whole.named_parameters():
        assert torch.equal(gradients.pop(half_names(name)), parameter.grad), name
    assert not gradients
    lanes = []
    for layer in halves.decoder.layers[1::2]:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: lanes.append(kwargs["context"]), with_kwargs=True
        )
    losses(halves)
    assert [lane is None for lane in lanes] == [True, False], "the lane of the last pass is left"


def test_lane_passes_other_layers(monkeypatch):
    model = hybrid(monkeypatch, "M*EM*-E")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = losses(model).mean()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0]
    residuals = [n for n, _ in model.named_parameters() if n.endswith("residual_weight")]
    assert residuals == ["decoder.layers.6.mlp.router.residual_weight"]
    keys = {tensor.key for tensor in model.sharded_state_dict().values() if hasattr(tensor, "key")}
    assert keys.issuperset(residuals)


REFUSED = {
    "--pipeline-model-parallel-size (2) must be 1": {"pipeline_model_parallel_size": 2},
    "--recompute-granularity (full) must be selective": {"recompute_granularity": "full"},
    "--cuda-graph-impl (local) must be none": {"cuda_graph_impl": "local"},
    "--hybrid-layer-pattern (*-) must have an E": {"pattern": "*-"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_pattern_cannot_have(message, monkeypatch):
    with pytest.raises(ValueError, match=re.escape(message)):
        hybrid(monkeypatch, **{"pattern": "*E"} | REFUSED[message])


def test_a_pattern_without_transformer_engine(monkeypatch):
    monkeypatch.setattr(megatron_lm, "HAVE_TE", False)
    with pytest.raises(ValueError, match="must have Transformer Engine"):
        hybrid(monkeypatch, "*E")
