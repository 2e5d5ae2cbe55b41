"""ZEDA's published rule, written out token by token, as classes of the transformers package.

Names of fields and modules, and the default of `use_zce_mask`, which masks, are those of ZEDA's
`qwen3_moe_plus_plus`; nothing here is of this package.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP


class Qwen3MoePlusPlusConfig(Qwen3MoeConfig):
    model_type = "qwen3_moe_plus_plus"
    zce_nums: list[int] | None = None
    zce_types: list[str] | None = None
    use_zce_mask: bool = True


class Constant(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.constant = nn.Parameter(torch.randn(width))
        self.wg = nn.Linear(width, 2, bias=False)

    def forward(self, token):
        keep, replace = torch.softmax(self.wg(token), dim=-1)
        return keep * token + replace * self.constant


class Zero(nn.Module):
    def forward(self, token):
        return torch.zeros_like(token)


class PlusPlusBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.ffn = config, config.num_experts
        width, inner = config.hidden_size, config.moe_intermediate_size
        others = {"constant": lambda: Constant(width), "copy": nn.Identity, "zero": Zero}
        experts = [Qwen3MoeMLP(config, inner) for _ in range(self.ffn)]
        for kind, count in zip(config.zce_types, config.zce_nums, strict=True):
            experts += [others[kind]() for _ in range(count)]
        self.experts = nn.ModuleList(experts)
        self.gate = nn.Linear(width, len(experts), bias=False)

    def forward(self, hidden):
        config, out = self.config, torch.zeros_like(hidden)
        for place in torch.cartesian_prod(*map(torch.arange, hidden.shape[:2])):
            token = hidden[tuple(place)]
            logits = self.gate.weight.float() @ token.float()
            if config.use_zce_mask:
                logits[self.ffn :] = -torch.inf
            scores = F.softmax(logits, dim=0)
            picks = scores.topk(config.num_experts_per_tok).indices
            weights = scores[picks]
            if config.norm_topk_prob:
                weights = weights / weights.sum()
            results = [w * self.experts[int(e)](token) for w, e in zip(weights, picks, strict=True)]
            out[tuple(place)] = torch.stack(results).sum(dim=0)
        return out


def _with_blocks(model):
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp = PlusPlusBlock(model.config)


class Qwen3MoePlusPlusForCausalLM(Qwen3MoeForCausalLM):
    config_class = Qwen3MoePlusPlusConfig

    def __init__(self, config):
        super().__init__(config)
        _with_blocks(self)


AutoConfig.register(Qwen3MoePlusPlusConfig.model_type, Qwen3MoePlusPlusConfig)
AutoModelForCausalLM.register(Qwen3MoePlusPlusConfig, Qwen3MoePlusPlusForCausalLM)
