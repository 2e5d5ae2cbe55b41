"""A wrapper that the pipeline needs around a model chunk without a data-parallel wrapper."""

from typing import Any

from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from moepp_megatron.config import Config
from moepp_megatron.model.megatron_config import moepp_config
from moepp_megatron.moe.lane import pipeline_config


class PipelineStage(MegatronModule):
    """A model chunk with the configuration from which schedules read tensor widths between stages.

    In training that is the data-parallel wrapper, which has buffers that nobody else needs.
    """

    def __init__(self, config: TransformerConfig, module: LanguageModule) -> None:
        super().__init__(config)
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same as the chunk's own `forward`."""
        return self.module(*args, **kwargs)


def evaluation_stages(models: list[LanguageModule], config: Config) -> list[PipelineStage]:
    """This rank's chunks in evaluation mode, ready for a pipeline without gradients."""
    wide = pipeline_config(models[0].config, moepp_config(config))
    return [PipelineStage(wide, model.eval()) for model in models]
