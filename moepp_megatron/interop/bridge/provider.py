"""Megatron-Bridge's provider of a MoE++ model: its settings, and how each stage is built."""

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.utils.config_utils import _ConfigContainerBase
from megatron.bridge.utils.fusions import validate_rope_fusion_compatibility
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from moepp_megatron.config import Config
from moepp_megatron.interop.expressible import refuse_settings
from moepp_megatron.interop.megatron_arguments import balance_of
from moepp_megatron.interop.stage import block_spec, build_stage
from moepp_megatron.layer_settings import BALANCE_TYPES
from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.model.megatron_config import moepp_config, transformer_fields
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.runtime.optional import have_transformer_engine

# Bridge's loop decides these: whether weights are loaded, and how losses are divided.
_OF_THE_LOOP = ("perform_initialization", "calculate_per_token_loss")
_NO_LAYER = "this package builds no such layer there"


@dataclass
class MoEPPModelProvider(GPTModelProvider):
    """A GPT provider whose stages are MoE++ models, gating residuals across stages included.

    Megatron's own fields keep their meaning (`num_moe_experts` counts FFN experts); the balance
    loss follows `moe_router_load_balancing_type` and `moe_aux_loss_coeff`, also where a recipe
    changes them later.
    """

    moepp: MoEPPConfig | None = None
    # A stage's configuration has the width of what stages exchange as its hidden size.
    _hidden_size_of_layers: int | None = dataclasses.field(default=None, init=False, repr=False)
    # The configurations of its stages, where they are no longer this one.
    _stages: list[Any] = dataclasses.field(default_factory=list, init=False, repr=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field, also of the stages: Bridge's loop sets its functions once they are built."""
        super().__setattr__(name, value)
        for stage in self.__dict__.get("_stages", ()):
            setattr(stage, name, value)

    @classmethod
    def from_config(cls, config: Config) -> "MoEPPModelProvider":
        """Provider of the model, precision and layout that a configuration of ours describes.

        ConfigError if the model has a part that is not built here.
        """
        model, moe = config.model, config.moe
        scope = "head" if model.qk_layernorm else model.qk_layernorm_scope
        rows = (
            ("model.latent_attention", (None,), _NO_LAYER),
            ("model.mtp_num_layers", (0,), _NO_LAYER),
            ("model.qk_layernorm_scope", (scope,), _NO_LAYER),
        )
        refuse_settings(config, rows, "Megatron-Bridge", "use `moepp train`")
        balance = BALANCE_TYPES[moe.balance_scope] if moe.balance_coeff > 0 else "none"
        fields = transformer_fields(config) | {
            "moe_router_load_balancing_type": balance,
            "moe_aux_loss_coeff": moe.balance_coeff,
        }
        return cls(
            moepp=moepp_config(config),
            vocab_size=model.vocab_size,
            seq_length=model.seq_length,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,
            **{name: value for name, value in fields.items() if name not in _OF_THE_LOOP},
        )

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MoEPPGPTModel:
        """Build one stage, as `GPTModelProvider.provide`; ValueError if a setting is refused."""
        if self.moepp is None:
            raise ValueError(
                "MoEPPModelProvider.moepp (None) must be a MoEPPConfig; use "
                f"MoEPPConfig(num_ffn_experts={self.num_moe_experts})"
            )
        if self.mtp_num_layers:
            raise ValueError(
                f"MoEPPModelProvider.mtp_num_layers ({self.mtp_num_layers}) must be None: further "
                "tokens have only been trained by `moepp train`; leave it out"
            )
        if not validate_rope_fusion_compatibility(self):
            self.apply_rope_fusion = False
        scope, beta = balance_of(self)
        moepp = dataclasses.replace(self.moepp, balance_scope=scope, balance_coeff=beta)
        # Transformer Engine's layers read it.
        self._vp_stage = vp_stage
        with torch.device("meta") if self.init_model_with_meta_device else nullcontext():
            stage = build_stage(
                self,
                self,
                moepp,
                self._pg_collection,
                pre_process,
                post_process,
                vp_stage,
                use_te=have_transformer_engine(),
            )
        if stage.config is not self:
            assert isinstance(stage.config, MoEPPModelProvider)
            stage.config._hidden_size_of_layers = self.hidden_size
            stage.config._stages = []
            self._stages.append(stage.config)
        return stage

    def to_cfg_dict(self) -> dict[str, Any]:
        """Return Bridge's `run_config.yaml`: the fields, with the layers' hidden size."""
        fields = {
            field.name: _ConfigContainerBase._convert_value_to_dict(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if not field.name.startswith("_")
        }
        fields["hidden_size"] = self._hidden_size_of_layers or self.hidden_size
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}", **fields}


def moepp_layer_spec(
    provider: GPTModelProvider, vp_stage: int | None = None, *, moepp: MoEPPConfig
) -> TransformerBlockSubmodules:
    """Layers for a plain `GPTModelProvider`, whose model hands no router logits between stages.

    Give it as `transformer_layer_spec=functools.partial(moepp_layer_spec, moepp=MoEPPConfig(...))`.
    ValueError if there is a gating residual across stages, or a setting is refused.
    """
    stages = provider.pipeline_model_parallel_size
    if stages > 1 and moepp.gating_residual:
        raise ValueError(
            f"pipeline_model_parallel_size ({stages}) must be 1 for a GPTModelProvider with a "
            "gating residual; use MoEPPModelProvider, or gating_residual=False"
        )
    return block_spec(provider, moepp, vp_stage, have_transformer_engine())
