"""From the user's configuration to the settings that the layers are built from."""

import dataclasses

import pytest
import torch
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.transformer_config import TransformerConfig

from moepp_megatron.config import load_config
from moepp_megatron.config.schema.megatron import MegatronSection
from moepp_megatron.model import local_modules, megatron_config
from moepp_megatron.model.megatron_config import moepp_config, transformer_config
from moepp_megatron.moe.upstream_settings import IDLE, OURS, REFUSED
from tests import ROOT
from tests.refusals import config_error

QUICKSTART = ROOT / "configs/quickstart.yaml"


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_any_topk_gives_a_configuration(topk):
    config = load_config(QUICKSTART, [f"moe.router_topk={topk}"])
    assert transformer_config(config).moe_router_topk == topk
    assert moepp_config(config).router_topk == topk


EP2 = ["parallel.expert_model_parallel_size=2"]


@pytest.mark.parametrize(
    ("backend", "length", "theirs", "pads"),
    [
        ("auto", 128, "deepep", False),
        ("deepep", 100, "deepep", False),
        ("hybridep", 128, "hybridep", False),
        # 100 tokens a sequence, one sequence: not whole chunks of 64 tokens.
        ("hybridep", 100, "hybridep", True),
    ],
)
def test_flex_settings_reach_megatron(backend, length, theirs, pads):
    overrides = [*EP2, "moe.dispatcher=flex", f"moe.flex_backend={backend}", "moe.flex_num_sms=24"]
    overrides += [f"model.seq_length={length}", "training.micro_batch_size=1"]
    config = transformer_config(load_config(QUICKSTART, overrides))
    assert config.moe_flex_dispatcher_backend == theirs
    assert config.moe_flex_dispatcher_num_sms == 24
    assert config.moe_hybridep_pad_uneven_dispatch_inputs is pads


def test_graphs_and_overlap_reach_megatron():
    config = transformer_config(load_config(QUICKSTART, ["training.cuda_graphs=[attn]"]))
    assert (config.cuda_graph_impl, config.cuda_graph_modules) == ("local", [CudaGraphModule.attn])
    overrides = [*EP2, "precision.dtype=bf16", "parallel.overlap_moe_expert_parallel_comm=true"]
    config = transformer_config(load_config(QUICKSTART, overrides))
    assert config.overlap_moe_expert_parallel_comm
    assert config.cuda_graph_impl == "none"


def test_settings_of_megatron_are_its_own_and_reach_it():
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    for name, setting in MegatronSection.model_fields.items():
        field, default = fields[name], setting.default
        assert default == (field.default_factory() if isinstance(default, list) else field.default)
        assert isinstance(default, list) or type(default) is field.type
    ignored = {*OURS, *REFUSED, *IDLE} & MegatronSection.model_fields.keys()
    assert ignored == {"moe_router_fusion"}, "refused but for vanilla layers"
    config = load_config(QUICKSTART, ["megatron.fused_single_qkv_rope=true"])
    assert transformer_config(config).fused_single_qkv_rope
    assert not transformer_config(load_config(QUICKSTART)).fused_single_qkv_rope


@pytest.mark.parametrize("name", OURS)
def test_what_a_setting_of_ours_decides_is_named(name):
    with config_error(r"^unknown key megatron\.\w+; did you mean moe\.\w+\?"):
        load_config(QUICKSTART, [f"megatron.{name}=1"])


def test_weight_gradients_are_accumulated_in_the_product_where_apex_can(monkeypatch):
    config = load_config(QUICKSTART, [])
    assert not transformer_config(config).gradient_accumulation_fusion
    monkeypatch.setattr(megatron_config, "have_fused_weight_gradient", lambda: True)
    assert transformer_config(config).gradient_accumulation_fusion


def test_apex_norm_is_called_where_it_is_there(monkeypatch):
    config = transformer_config(load_config(QUICKSTART, []))
    plain = local_modules._SequenceParallelRMSNorm(config, config.hidden_size)
    x = torch.randn(3, 2, config.hidden_size)
    expected = plain(x)
    calls = []

    def fused(x, weight, shape, eps):
        calls.append((tuple(shape), eps))
        return torch.nn.functional.rms_norm(x, shape, weight, eps)

    monkeypatch.setattr(local_modules, "fused_rms_norm", lambda: fused)
    found = local_modules._SequenceParallelRMSNorm(config, config.hidden_size)(x)
    assert torch.equal(found, expected)
    assert calls == [((config.hidden_size,), 1e-5)]
