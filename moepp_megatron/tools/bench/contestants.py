"""The two layers: MoE++, and megatron-core's own MoE layer, unmodified, of the same FFN experts."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from torch import Tensor

from moepp_megatron.config import Config, Layout, parse_config
from moepp_megatron.experts import KINDS
from moepp_megatron.layer_settings import Fused
from moepp_megatron.model.local_modules import fit_local_modules
from moepp_megatron.model.megatron_config import moepp_config, transformer_config
from moepp_megatron.moe.layer import MoEPPLayer
from moepp_megatron.moe.spec import get_moepp_layer_spec, vanilla_submodules
from moepp_megatron.runtime import distributed
from moepp_megatron.runtime.optional import have_transformer_engine
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.tools.bench.bounds import MinimalWork, RoutedLoad, layer_work
from moepp_megatron.tools.bench.held_routing import balanced_selection, balanced_shares, hold
from moepp_megatron.tools.bench.shapes import SHAPES, PaperShape

_SEED = 1234
TOPK = 2


def layer_config(
    shape: PaperShape,
    tau: float,
    dtype: str,
    vanilla: bool,
    fp8_recipe: str = "delayed",
    fused: Fused = "auto",
) -> Config:
    """A configuration whose MoE layers are those of `shape`; `fp8_recipe` counts for "fp8"."""
    precision: dict[str, object] = {"dtype": dtype}
    if dtype == "fp8":
        precision = {"dtype": "bf16", "fp8": "hybrid", "fp8_recipe": fp8_recipe}
    experts = shape.experts.vanilla if vanilla else shape.experts
    return parse_config(
        {
            "run": {"dir": "unused"},
            "model": {
                "num_layers": 2,
                "hidden_size": shape.hidden_size,
                "ffn_hidden_size": shape.ffn_hidden_size,
                "num_attention_heads": shape.num_attention_heads,
                "seq_length": 2048,
                "vocab_size": 256,
            },
            "moe": {
                **{kind.setting: experts.count(kind) for kind in KINDS},
                "router_topk": TOPK,
                "tau": tau,
                "gating_residual": experts.gating_residual,
                "fused": fused,
            },
            "precision": precision,
            "optimizer": {"lr": 1e-3},
            "training": {"train_iters": 1, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )


class Contestant:
    """One layer of `shape` with local tokens, held routing and a gradient to send back.

    `tau` is the weight of a zero-computation expert in the balance, `dtype` "fp32", "bf16" or "fp8"
    (the experts' products in FP8, all else in bf16). With `vanilla` the layer is megatron-core's.
    `fp8_recipe`, for "fp8", and `fused` are the settings of these names.
    """

    def __init__(
        self,
        shape: PaperShape,
        tau: float,
        dtype: str,
        num_tokens: int,
        *,
        vanilla: bool,
        fp8_recipe: str = "delayed",
        fused: Fused = "auto",
    ) -> None:
        config = layer_config(shape, tau, dtype, vanilla, fp8_recipe, fused)
        self._is_vanilla = vanilla
        self.layer: Any = _vanilla_layer(config) if vanilla else _moepp_layer(config)
        device = torch.cuda.current_device()
        self.layer.to(device)
        self.layer.set_layer_number(1)
        generator = torch.Generator().manual_seed(_SEED)
        experts = config.moe
        shares = balanced_shares(experts.num_ffn_experts, experts.num_zero_computation_experts, tau)
        picks = balanced_selection(num_tokens, shares, TOPK, generator)
        hold(self.layer.router, picks)
        self.load = RoutedLoad.of(picks, shape)
        fused = isinstance(self.layer, MoEPPLayer) and self.layer.fuses_rows
        self.work: dict[str, MinimalWork] = layer_work(
            shape, self.load, dtype, topk=TOPK, vanilla=vanilla, fused=fused
        )
        size = (num_tokens, 1, shape.hidden_size)
        params_dtype = self.layer.config.params_dtype
        self._input = torch.randn(size, generator=generator).to(device, params_dtype)
        self._output_grad = torch.randn(size, generator=generator).to(device, params_dtype)
        # Logits of a layer before, of the spread that routers have.
        previous = torch.randn(num_tokens, 1, experts.num_experts, generator=generator)
        self._previous = previous.to(device)
        self._input.requires_grad_()
        self._previous.requires_grad_()
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))

    def forward(self) -> Tensor:
        """One forward pass as in training; returns the output [T, 1, D]."""
        inputs = (self._input,) if self._is_vanilla else (self._input, self._previous)
        with get_fp8_context(self.layer.config):
            output, _ = self.layer(*inputs)
        return output

    @property
    def experts(self) -> str:
        """Class of the FFN experts, such as "TEGroupedMLP"."""
        return type(self.layer.experts).__name__

    def forward_only(self) -> Tensor:
        """One forward pass without gradients."""
        with torch.no_grad():
            return self.forward()

    def forward_backward(self) -> None:
        """Forward and backward, gradients of the input and of all parameters included."""
        self.forward().backward(self._output_grad)
        self._input.grad = self._previous.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None


def _megatron(config: Config) -> Any:
    megatron = transformer_config(config)
    # The wrapper that owns the buffers to accumulate gradients in is not here.
    megatron.gradient_accumulation_fusion = False
    return megatron


def _moepp_layer(config: Config) -> Any:
    megatron = _megatron(config)
    use_te = have_transformer_engine()
    spec = get_moepp_layer_spec(
        megatron,
        moepp_config(config),
        use_transformer_engine=use_te,
        adapt=None if use_te else fit_local_modules,
    )
    return _built(spec.submodules.mlp, megatron)


def _vanilla_layer(config: Config) -> Any:
    """Build megatron-core's own layer from its specs, with a grouped product as MoE++ has."""
    megatron = _megatron(config)
    experts = megatron.num_moe_experts
    if have_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=megatron.moe_grouped_gemm
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=experts, moe_grouped_gemm=False, normalization=megatron.normalization
        )
    builder = spec.submodules.mlp
    own = vanilla_submodules(builder.keywords["submodules"], megatron)
    layer = _built(partial(builder, submodules=own), megatron)
    assert type(layer) is MoELayer, f"{type(layer)} is not megatron-core's own"
    return layer


def _built(builder: Any, megatron: Any) -> Any:
    layer = builder(
        config=megatron, pg_collection=get_default_pg_collection(), is_mtp_layer=False, name=None
    )
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return layer


@contextmanager
def single_process() -> Iterator[None]:
    """A context with Megatron's groups of one rank, which a layer needs to be built."""
    distributed.start(RankEnvironment())
    try:
        any_config = layer_config(SHAPES["0.6B"], 0.75, "fp32", False)
        distributed.build_groups(any_config, Layout.from_config(any_config, 1))
        yield
    finally:
        distributed.stop()
