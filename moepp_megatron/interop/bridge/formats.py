"""Megatron-Bridge's bridges of MoE++ models: the released format, ours, and ZEDA's for Qwen3."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import HFWeightTuple, MegatronModelBridge
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
from megatron.core.models.gpt import GPTModel
from transformers import AutoConfig, PreTrainedConfig

from moepp_megatron.config import Config
from moepp_megatron.interop.bridge.mapping import rule_mappings
from moepp_megatron.interop.bridge.provider import MoEPPModelProvider
from moepp_megatron.interop.hf_source import HFSource
from moepp_megatron.interop.tensor_rules import TensorRule
from moepp_megatron.interop.to_mcore import account_for, read_format

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
        return MegatronMappingRegistry(*rule_mappings(self._format[1]))

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
        account_for(HFSource(hf_pretrained.state.source.path), self._format[1])
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
        names = {source.name for rule in self._format[1] if rule.unused for source in rule.sources}
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
