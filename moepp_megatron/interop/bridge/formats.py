"""Megatron-Bridge's bridges of MoE++ models: the released format, ours, and ZEDA's for Qwen3."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import HFWeightTuple, MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from moepp_megatron.config import Config
from moepp_megatron.interop.bridge.provider import MoEPPModelProvider
from moepp_megatron.interop.hf_source import HFSource
from moepp_megatron.interop.tensor_rules import TensorRule
from moepp_megatron.interop.to_mcore import read_format

# Keys of checkpoints name norms as megatron-core's fused norm-and-linear layers do.
_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_EXPERTS = ".mlp.experts.experts."
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def _rule_mappings(rules: Iterable[TensorRule]) -> Iterator["_RuleMapping"]:
    """A mapping for every name that a parameter has on some back end."""
    by_key: dict[str, list[TensorRule]] = defaultdict(list)
    for rule in rules:
        if not rule.unused:
            by_key[rule.key].append(rule)
    for key, own in by_key.items():
        before, is_expert, after = key.partition(_EXPERTS)
        if is_expert:
            for expert in range(len(own)):
                # megatron-core's module for each expert, or Transformer Engine's for all.
                yield _RuleMapping(
                    f"{before}.mlp.experts.local_experts.{expert}.{after}", own, expert
                )
                yield _RuleMapping(f"{before}.mlp.experts.{after}{expert}", own, expert)
        else:
            yield _RuleMapping(key, own)
            for fused, separate in _NORMS.items():
                if key.endswith(fused):
                    yield _RuleMapping(key.removesuffix(fused) + separate, own)


class _RuleMapping(MegatronParamMapping):
    """The parameter `name`, made by the rules of one key; only of `expert` where one is given."""

    # Tensor-parallel ranks hold parts along the axis in which the parameter is smaller than its
    # rule says.

    def __init__(self, name: str, rules: list[TensorRule], expert: int | None = None) -> None:
        self.rules, self.expert = rules, expert
        self._own = rules if expert is None else [rules[expert]]
        names = [name for rule in self._own for name in rule.sources]
        super().__init__(name, names[0] if len(names) == 1 else {name: name for name in names})

    def resolve(self, captures: tuple[str, ...]) -> "_RuleMapping":
        """A mapping of its own for another task; there are no wildcards."""
        return _RuleMapping(self.megatron_param, self.rules, self.expert)

    def hf_to_megatron(
        self, hf_weights: Tensor | Mapping[str, Tensor], megatron_module: torch.nn.Module
    ) -> Tensor:
        """This rank's part of the parameter."""
        if isinstance(hf_weights, Tensor):
            hf_weights = {self.hf_param: hf_weights}
        packed = {
            rule.index: rule.pack([hf_weights[name] for name in rule.sources]) for rule in self._own
        }
        whole = torch.stack(list(packed.values())) if self._is_stacked else [*packed.values()][0]
        # Transformer Engine numbers its experts on each rank anew; all have one shape.
        name = re.sub(r"\d+$", "0", self.megatron_param.rpartition(".")[2])
        local = getattr(megatron_module, name)
        return self._part(whole.to(local.device, local.dtype), local.shape)

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, Tensor]:
        """The tensors that the parameter, or the expert on each expert-parallel rank, makes."""
        local = self.broadcast_from_pp_rank(megatron_weights, cache_key=self.megatron_param)
        whole = self._joined(self.maybe_dequantize(local))
        if self.expert is None:
            slices = [(r, whole if r.index is None else whole[r.index]) for r in self.rules]
        else:
            slices = list(zip(self._of_same_place(), self._of_experts(whole), strict=True))
        found: dict[str, Tensor] = {}
        for rule, tensor in slices:
            assert rule.unpack is not None, f"{rule.key} cannot be converted back"
            found |= zip(rule.sources, rule.unpack(tensor), strict=True)
        return found

    @property
    def _is_stacked(self) -> bool:
        return self.expert is None and self.rules[0].index is not None

    @property
    def _shape(self) -> tuple[int, ...]:
        rule = self.rules[0]
        return rule.shape if self.expert is None else rule.slice_shape

    def _of_same_place(self) -> list[TensorRule]:
        """The rules of the experts that have this one's place on each expert-parallel rank."""
        assert self.expert is not None, "only experts are split so"
        each = len(self.rules) // self.ep_size
        return self.rules[self.expert % each :: each]

    def _of_experts(self, whole: Tensor) -> list[Tensor]:
        if self.ep_size == 1:
            return [whole]
        gathered = [torch.empty_like(whole) for _ in range(self.ep_size)]
        dist.all_gather(gathered, whole.contiguous(), group=self.ep_group)
        return gathered

    def _axis(self, local: Iterable[int]) -> int | None:
        """The axis that tensor-parallel ranks split; None for none."""
        if self.megatron_param in _VOCABULARY:
            # A part of a padded one may be as long as the whole.
            return 0
        split = [
            i for i, (part, all_) in enumerate(zip(local, self._shape, strict=True)) if part != all_
        ]
        return split[0] if split else None

    @property
    def _halves(self) -> int:
        # Gate above up projection: each is split by itself.
        return 2 if "linear_fc1.weight" in self.megatron_param else 1

    def _part(self, whole: Tensor, local: torch.Size) -> Tensor:
        axis = self._axis(local)
        if axis is None:
            return whole
        if self.megatron_param in _VOCABULARY:
            padding = local[0] * self.tp_size - whole.shape[0]
            whole = torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])])
        halves = whole.chunk(self._halves) if axis == 0 else [whole]
        return torch.cat([half.chunk(self.tp_size, axis)[self.tp_rank] for half in halves], axis)

    def _joined(self, local: Tensor) -> Tensor:
        axis = self._axis(local.shape)
        if axis is None:
            return local
        parts = self.gather_from_tp_ranks(local.contiguous())
        count = self._halves if axis == 0 else 1
        halves = [part.chunk(count)[half] for half in range(count) for part in parts]
        whole = torch.cat(halves, axis)
        return whole[: self._shape[0]] if self.megatron_param in _VOCABULARY else whole


# `architectures` and `model_type` of each format.
_FORMATS = {
    "MoeForCausalLM": "MoE++",
    "MoEPPForCausalLM": "moepp",
    "Qwen3MoePlusPlusForCausalLM": "qwen3_moe_plus_plus",
}


class _Bridge(MegatronModelBridge):
    """A Hugging Face folder in and out; which format it has says its `config.json`."""

    @cached_property
    def _format(self) -> tuple[Config, list[TensorRule]]:
        return read_format(self.hf_config.to_dict(), "bridge")

    def provider_bridge(self, hf_pretrained: Any) -> MoEPPModelProvider:
        """The provider of the folder's model; ConfigError if it is none that is built here."""
        return MoEPPModelProvider.from_config(self._format[0])

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Map parameters to the folder's tensors."""
        return MegatronMappingRegistry(*_rule_mappings(self._format[1]))

    @classmethod
    def megatron_to_hf_config(cls, provider: Any) -> dict[str, Any]:
        """Refused: a provider does not know in which format it shall be written."""
        raise ValueError(
            "a MoE++ model is written with the config.json of a Hugging Face folder; name it in "
            "AutoBridge.from_hf_pretrained"
        )

    def load_weights_hf_to_megatron(
        self, hf_pretrained: Any, megatron_model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Same as Bridge's; ConfigError where it would leave a parameter as it was initialised."""
        self.hf_config = hf_pretrained.config
        HFSource(hf_pretrained.state.source.path).account_for(self._format[1])
        return super().load_weights_hf_to_megatron(hf_pretrained, megatron_model, *args, **kwargs)

    def stream_weights_megatron_to_hf(
        self, megatron_model: Any, hf_pretrained: Any, *args: Any, **kwargs: Any
    ) -> Iterator[HFWeightTuple]:
        """Same as Bridge's, then what the folder holds and no model has."""
        yield from super().stream_weights_megatron_to_hf(
            megatron_model, hf_pretrained, *args, **kwargs
        )
        if kwargs.get("conversion_tasks") is not None or not hasattr(hf_pretrained, "state"):
            return
        names = {name for rule in self._format[1] if rule.unused for name in rule.sources}
        for name in sorted(names.intersection(hf_pretrained.state.source.get_all_keys())):
            yield HFWeightTuple(name, hf_pretrained.state[name])


# A checkpoint's `run_config.yaml` names the provider.
register_allowed_target_prefix("moepp_megatron.")
for _class, _type in _FORMATS.items():
    # The fields are the folder's, without a class's defaults, and none of its code is run.
    _config = type(f"{_class}Config", (PreTrainedConfig,), {"model_type": _type})
    AutoConfig.register(_type, _config, exist_ok=True)
    _bridge = type(f"{_class}Bridge", (_Bridge,), {"__doc__": _Bridge.__doc__})
    MegatronModelBridge.register_bridge(
        source=_class, target=GPTModel, provider=MoEPPModelProvider, model_type=_type
    )(_bridge)
