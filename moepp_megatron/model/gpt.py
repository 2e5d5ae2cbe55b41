"""GPTModel with the lane of router logits across pipeline stages."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.lane import lane_columns, no_logits, pack, unpack


class MoEPPGPTModel(GPTModel):
    """A pipeline stage (or the whole) of a GPT model with MoE++ layers.

    A stage that is not the first receives hidden states with the lane glued on and takes them
    apart; a stage that is not the last glues them together again. Everything between is
    `TransformerBlock`'s own `context` argument.

    Args:
        config: The model's configuration.
        *args: As `GPTModel`.
        moepp: MoE++ settings.
        **kwargs: As `GPTModel`.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, moepp: MoEPPConfig, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.moepp = moepp
        # Not read from `self.config` later: whoever wraps this model may give that the wider shape
        # of what stages exchange (`moepp_megatron.moe.lane.pipeline_config`).
        self._hidden_size = config.hidden_size
        self._lane: Tensor | None = None
        crosses_stages = config.pipeline_model_parallel_size > 1 and (
            lane_columns(moepp, config.params_dtype) > 0
        )
        self._receives_lane = crosses_stages and not self.pre_process
        self._sends_lane = crosses_stages and not self.post_process
        if self._sends_lane and len(self.decoder.layers) > 0:
            self.decoder.layers[-1].lane_width = moepp.num_experts

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take what the stage before sent: [s, b, D + lane columns]."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if tensor is not None and self._receives_lane:
            tensor, self._lane = unpack(tensor, self._hidden_size)
        super().set_input_tensor(tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `GPTModel.forward`; a stage that is not the last returns [s, b, D + lane columns]."""
        lane, self._lane = self._lane, None
        output = super().forward(*args, extra_block_kwargs={"context": lane}, **kwargs)
        if self._sends_lane and len(self.decoder.layers) == 0:
            # A stage of embeddings only, or an empty one: no layer glues the lane on.
            if lane is None:
                lane = no_logits(output, self.moepp.num_experts)
            output = pack(output, lane)
        return output
