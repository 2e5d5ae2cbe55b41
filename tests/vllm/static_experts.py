"""A program for vLLM's own environment: the plug-in's static shapes, on a CPU.

vLLM's Triton kernels run by Triton's interpreter, in buffers full of NaN. The operators around them
that vLLM has for GPUs only, alignment and sum, are written again here. At the end the same layers
are played by tests/fake_gpu, where vLLM's operators and kernels do nothing.

python static_experts.py OUT.json
"""

# ruff: noqa: E402

import functools
import json
import os
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest import mock

os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
from triton.backends import backends

# vLLM asks for a driver of Triton's.
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

import torch
from torch import nn
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter

from moepp_megatron.interop.hf_files.configuration_moepp import MoEPPConfig
from moepp_megatron.interop.vllm import model as plugin
from tests.fake_gpu import machine
from tests.fake_gpu.record import RECORD

exported = plugin.exported
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_ffn_experts": 4, "num_attention_heads": 2}
EIGHT = {"num_ffn_experts": 8, "num_experts_per_tok": 4, "num_groups": 4, "group_topk": 2}
FORMS = {
    "paper": {},
    "one pick": {"num_experts_per_tok": 1, "gate_normalization": "none"},
    "two layers": {"two_layer_gate": True, "gate_normalization": "selected", "gate_scale": 1.5},
    "bias": {"selection_bias": True, "gate_normalization": "nonzero", "logits_norm_std": 1.5},
    "groups": EIGHT | {"score_function": "sigmoid", "selection_bias": True},
    "groups without a bias": EIGHT
    | {"num_experts_per_tok": 2, "group_topk": 1, "score_function": "sqrtsoftplus"},
    "shared": {"shared_expert_intermediate_size": 24, "shared_expert_gate": True}
    | {"expert_input_scale": 2.0, "hidden_size": 76, "moe_intermediate_size": 48},
    "vanilla": dict.fromkeys(("num_constant_experts", "num_copy_experts", "num_zero_experts"), 0)
    | {"gating_residual": False},
}


def drawn(seed):
    """Draw sizes and a form."""
    random = Random(seed)
    groups, size, temperature = random.randint(1, 4), random.randint(2, 4), random.uniform(0.5, 2.0)
    kept, each = random.randint(1, groups), random.randint(1, 2)
    shared = random.choice([None, 24])
    choices = {
        "num_constant_experts": (0, 1, 3),
        "num_copy_experts": (0, 1, 2),
        "num_zero_experts": (1, 2),
        "score_function": ("softmax", "sigmoid", "sqrtsoftplus"),
        "gate_normalization": ("none", "selected", "nonzero"),
        "logits_norm_std": (None, 1.5),
        "hidden_size": range(20, 80, 4),
        "moe_intermediate_size": range(8, 56, 8),
        **dict.fromkeys(("gate_scale", "expert_input_scale"), (1.0, 2.5)),
        **dict.fromkeys(("gating_residual", "two_layer_gate", "selection_bias"), (False, True)),
    }
    return {name: random.choice(values) for name, values in choices.items()} | {
        "num_ffn_experts": groups * size,
        "num_groups": groups,
        "group_topk": kept,
        "num_experts_per_tok": kept * each,
        "constant_temperature": temperature,
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": shared is not None and random.random() < 0.5,
    }


FORMS |= {f"drawn {seed}": drawn(seed) for seed in range(8)}
TOKENS = (1, 7, 16, 33)
LAYERS, ROWS = [], []


def owners(ids, count, expert_map):
    """This rank's numbers of experts, -1 for all others (vLLM's `get_local_expert_id`)."""
    own = (ids >= 0) & (ids < count)
    if expert_map is None:
        return ids.masked_fill(~own, -1)
    return expert_map[ids.masked_fill(~own, 0).long()].masked_fill(~own, -1)


def align(ids, count, block, rows, experts, padded, expert_map, scatter):
    local = owners(ids.flatten(), count, expert_map)
    parts, numbers = [], []
    for expert in range(count):
        own = torch.where(local == expert)[0].int()
        blocks = -(-len(own) // block)
        parts.append(torch.full((blocks * block,), ids.numel(), dtype=torch.int32))
        parts[-1][: len(own)] = own
        numbers += [expert] * blocks
    sorted_rows = torch.cat(parts)
    rows.fill_(ids.numel())
    rows[: len(sorted_rows)] = sorted_rows
    experts[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    padded.fill_(len(sorted_rows))
    ROWS.append(int((sorted_rows < ids.numel()).sum()))


def add_up(outputs, total, ids=None, expert_map=None):
    if ids is not None:
        is_other = owners(ids, len(expert_map), expert_map) < 0
        outputs = outputs.masked_fill(is_other[:, :, None], 0.0)
    total.copy_(outputs.sum(1))


class Ffn(nn.Module):
    """vLLM's runner as far as the plug-in knows it, with vLLM's router and Triton kernels."""

    def __init__(
        self, num_experts, top_k, hidden_size, intermediate_size, custom_routing_function, **_
    ):
        super().__init__()
        self.router = CustomRoutingRouter(top_k, num_experts, custom_routing_function)
        self.routed_experts = nn.Module()
        self.routed_experts.register_buffer("_expert_map", None)
        self.count, self.index, self.own = num_experts, len(LAYERS), slice(None)
        self.kernels = object.__new__(TritonExperts)
        self.kernels.quant_config = FUSED_MOE_UNQUANTIZED_CONFIG
        self.kernels.quantization_emulation = False
        self.kernels.activation_config = SimpleNamespace(clamp_limit=None, alpha=None, beta=None)
        LAYERS.append(self)

    @property
    def expert_map(self):
        return self.routed_experts._expert_map

    def forward(self, x, picks):
        return run_ffn(x, picks, self.index)


def multiply(x: torch.Tensor, picks: torch.Tensor, index: int) -> torch.Tensor:
    layer = LAYERS[index]
    gates, ids = layer.router._select_experts(x, picks)
    w1, w2 = layer.w1[layer.own], layer.w2[layer.own]
    sizes = len(x), w1.shape[1], x.shape[1], ids.shape[1], layer.count, len(w1)
    shapes = layer.kernels.workspace_shapes(*sizes, None, MoEActivation.SILU)
    *workspaces, output = (x.new_full(shape, torch.nan) for shape in shapes)
    layer.kernels.apply(
        output, x, w1, w2, gates, ids, MoEActivation.SILU, layer.count, layer.expert_map,
        None, None, *workspaces, None, False,
    )  # fmt: skip
    return output


# As vLLM's own operator: opaque, and its output has the input's shape.
run_ffn = torch.library.custom_op("moepp_tests::ffn", multiply, mutates_args=())


@run_ffn.register_fake
def _(x, picks, index):
    return torch.empty_like(x)


def build(fields):
    """The exported layer, and the same with the plug-in's experts."""
    config = MoEPPConfig(**(SIZES | fields), moe_layers=[1, 1])
    torch.manual_seed(0)
    layers = [exported.MoEPPLayer(config, True).eval() for _ in range(2)]
    for parameter in layers[0].parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in layers[0].named_buffers():
        if name.endswith("bias"):
            buffer.copy_(torch.linspace(0.05, -0.05, len(buffer)))
    layers[1].load_state_dict(layers[0].state_dict())
    experts = plugin._Experts(config, "model.layers.1.mlp.moe.experts")
    experts.experts = layers[0].experts.experts
    experts.ffn.w1 = layers[0].experts.ffn.gate_up_proj.data
    experts.ffn.w2 = layers[0].experts.ffn.down_proj.data
    layers[1].experts = experts
    return config, *layers


def error(found, wanted):
    """The largest, of the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))


def check(fields):
    """Errors, and how many rows were multiplied of how many picks."""
    config, ours, static = build(fields)
    found = {"kernels": 0.0, "layer": 0.0, "ranks": 0.0, "compiled": 0.0, "rows": [], "picked": []}
    torch._dynamo.reset()
    compiled = torch.compile(static, fullgraph=True, dynamic=True, backend="eager")
    captured = []
    static.experts.capture_fn = captured.append
    for count in TOKENS:
        random = torch.Generator().manual_seed(count)
        x = torch.randn(count, config.hidden_size, generator=random)
        lane = torch.randn(count, config.total_experts, generator=random)
        gates, chosen, _ = ours.gate(x, lane)
        # A token without a pick of an FFN expert, where the form has others.
        chosen[0] = config.total_experts - 1
        is_ffn = chosen < config.num_ffn_experts
        exact = ours.experts.ffn.double()(
            x.double(), chosen, gates.double().masked_fill(~is_ffn, 0)
        )
        ours.experts.ffn.float()
        ROWS.clear()
        output = static.experts.ffn_output(x, gates, chosen)
        assert torch.equal(captured.pop(), chosen.int())
        assert output[0].any() == is_ffn[0].any()
        found["rows"].append(sum(ROWS))
        found["picked"].append(int(is_ffn.sum()))
        found["kernels"] = max(found["kernels"], error(output, exact))
        whole, half = static.experts.ffn.expert_map, -(-config.num_ffn_experts // 2)
        total = torch.zeros_like(output)
        for rank in range(2):
            own = torch.full_like(whole, -1)
            static.experts.ffn.own = slice(rank * half, (rank + 1) * half)
            part = own[static.experts.ffn.own]
            part.copy_(torch.arange(len(part)))
            static.experts.ffn.routed_experts._expert_map = own
            total += static.experts.ffn_output(x, gates, chosen)
        static.experts.ffn.routed_experts._expert_map = whole
        static.experts.ffn.own = slice(None)
        found["ranks"] = max(found["ranks"], error(total, output))
        expected, theirs, again = ours(x, lane), static(x, lane), compiled(x, lane)
        found["layer"] = max(found["layer"], error(theirs[0], expected[0]))
        found["compiled"] = max(found["compiled"], error(again[0], theirs[0]))
        assert torch.equal(expected[1], theirs[1])
    tokens = torch.export.Dim("tokens", min=1)
    program = torch.export.export(static, (x, lane), dynamic_shapes=({0: tokens}, {0: tokens}))
    # Sizes that depend on numbers would be symbols without a backing value.
    found["unbacked"] = [str(s) for s in program.range_constraints if str(s).startswith("u")]
    static.experts.ffn.routed_experts._expert_map = None
    try:
        static(x, lane)
        found["without a map"] = "no error"
    except RuntimeError as refusal:
        found["without a map"] = str(refusal)
    return found


def play(fields):
    """Whatever would make the host wait for the device, and Triton kernels, of one call."""
    config, _, static = build(fields)
    ffn = static.experts.ffn
    like = functools.partial(torch.empty_like, device="cuda")
    with machine.fake_mode():
        for module in static.modules():
            for held in (module._parameters, module._buffers):
                held |= {name: like(each) for name, each in held.items() if each is not None}
        ffn.w1, ffn.w2 = like(ffn.w1), like(ffn.w2)
        sizes = (config.hidden_size, config.total_experts)
        inputs = [torch.empty(33, width, device="cuda") for width in sizes]
        RECORD.clear()
        static(*inputs)
    return {"reads": dict(RECORD.reads), "launches": dict(RECORD.launches)}


def main():
    torch.set_grad_enabled(False)
    with (
        mock.patch.object(plugin, "FusedMoEFactory", Ffn),
        mock.patch.object(plugin.current_platform, "is_cpu", return_value=False),
        mock.patch.object(plugin, "tensor_model_parallel_all_reduce", lambda x: x),
        mock.patch.multiple(ops, moe_align_block_size=align, moe_sum=add_up),
    ):
        found = {name: check(fields) for name, fields in FORMS.items()}
        # It replaces functions of torch and Triton for the rest of the process.
        machine.install()
        InterpretedFunction.run = JITFunction.run
        nothing = mock.Mock(return_value=None)
        with (
            mock.patch.dict(globals(), run_ffn=multiply),
            mock.patch.multiple(ops, moe_align_block_size=nothing, moe_sum=nothing),
        ):
            for name, fields in FORMS.items():
                found[name] |= play(fields)
    assert RECORD.faults == []
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
