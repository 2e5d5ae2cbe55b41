"""ZEDA's published rule, written out token by token, as classes of the transformers package.

Names of fields and modules, and the default of `use_zce_mask`, which masks, are those of ZEDA's
`qwen3_moe_plus_plus` and `glm4_moe_lite_plus_plus`; nothing here is of this package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP


class Qwen3MoePlusPlusConfig(Qwen3MoeConfig):
    model_type = "qwen3_moe_plus_plus"
    zce_nums: list[int] | None = None
    zce_types: list[str] | None = None
    use_zce_mask: bool = True


class Glm4MoeLitePlusPlusConfig(Glm4MoeLiteConfig):
    model_type = "glm4_moe_lite_plus_plus"
    zce_nums: list[int] | None = None
    zce_types: list[str] | None = None
    use_zce_mask: bool = True


class Constant(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(width))
        self.wg = nn.Linear(width, 2, bias=False)

    def forward(self, token: Tensor) -> Tensor:
        keep, replace = torch.softmax(self.wg(token), dim=-1)
        return keep * token + replace * self.constant


class Zero(nn.Module):
    def forward(self, token: Tensor) -> Tensor:
        return torch.zeros_like(token)


class Gate(nn.Module):
    def __init__(self, rows: int, width: int, biased: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, width))
        if biased:
            self.register_buffer("e_score_correction_bias", torch.zeros(rows))


class PlusPlusBlock(nn.Module):
    def __init__(self, config: Qwen3MoePlusPlusConfig | Glm4MoeLitePlusPlusConfig) -> None:
        super().__init__()
        self.config, self.is_glm = config, isinstance(config, Glm4MoeLitePlusPlusConfig)
        self.ffn = config.n_routed_experts if self.is_glm else config.num_experts
        width, inner = config.hidden_size, config.moe_intermediate_size
        others = {"constant": lambda: Constant(width), "copy": nn.Identity, "zero": Zero}
        experts: list[nn.Module] = [Qwen3MoeMLP(config, inner) for _ in range(self.ffn)]
        for kind, count in zip(config.zce_types, config.zce_nums, strict=True):
            experts += [others[kind]() for _ in range(count)]
        self.experts = nn.ModuleList(experts)
        self.gate = Gate(len(experts), width, self.is_glm)
        if self.is_glm:
            self.shared_experts = Qwen3MoeMLP(config, inner * config.n_shared_experts)

    def forward(self, hidden: Tensor) -> Tensor:
        config, out = self.config, torch.zeros_like(hidden)
        for place in torch.cartesian_prod(*map(torch.arange, hidden.shape[:2])):
            token = hidden[tuple(place)]
            logits = self.gate.weight.float() @ token.float()
            if config.use_zce_mask:
                logits[self.ffn :] = -torch.inf
            scores = torch.sigmoid(logits) if self.is_glm else F.softmax(logits, dim=0)
            ranked = scores + self.gate.e_score_correction_bias if self.is_glm else scores
            picks = ranked.topk(config.num_experts_per_tok).indices
            weights = scores[picks]
            if config.norm_topk_prob:
                weights = weights / weights.sum()
            if self.is_glm:
                weights = weights * config.routed_scaling_factor
            results = [w * self.experts[int(e)](token) for w, e in zip(weights, picks, strict=True)]
            out[tuple(place)] = torch.stack(results).sum(dim=0)
        return out + self.shared_experts(hidden) if self.is_glm else out


def _with_blocks(model: nn.Module) -> None:
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp = PlusPlusBlock(model.config)


class Qwen3MoePlusPlusForCausalLM(Qwen3MoeForCausalLM):
    config_class = Qwen3MoePlusPlusConfig

    def __init__(self, config: Qwen3MoePlusPlusConfig) -> None:
        super().__init__(config)
        _with_blocks(self)


class Glm4MoeLitePlusPlusForCausalLM(Glm4MoeLiteForCausalLM):
    config_class = Glm4MoeLitePlusPlusConfig

    def __init__(self, config: Glm4MoeLitePlusPlusConfig) -> None:
        super().__init__(config)
        _with_blocks(self)


for _config, _model in (
    (Qwen3MoePlusPlusConfig, Qwen3MoePlusPlusForCausalLM),
    (Glm4MoeLitePlusPlusConfig, Glm4MoeLitePlusPlusForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)
