"""The layers of a pipeline stage as the decoder of megatron-core's HybridModel.

A letter of the pattern is a whole transformer layer, so numbers and names of layers are those of a
GPTModel of megatron-core.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.lane import lane_columns, no_logits, pack, unpack
from moepp_megatron.moe.spec import moe_layer_pattern, of_stage
from moepp_megatron.runtime.patches import replaced

# HybridModel takes stages of any size from its pattern, and refuses these beside it.
_SIZES = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")


class _MoEPPStack(TransformerBlock):
    """Carries the lane as `context` between layers, packed with hidden states between stages."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        spec: TransformerBlockSubmodules,
        moepp: MoEPPConfig,
        sizes: dict[str, int | None],
        pre_process: bool,
        post_process: bool,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None,
        **of_pattern: Any,
    ) -> None:
        with replaced(config, **sizes):
            super().__init__(
                config,
                spec,
                pre_process=pre_process,
                post_process=post_process,
                pg_collection=pg_collection,
                vp_stage=vp_stage,
            )
        letters = len(of_pattern["layer_type_list"])
        assert letters == len(self.layers), "the pattern and the specs are of different stages"
        self._num_experts = moepp.num_experts
        self._has_lane = lane_columns(moepp, config.params_dtype) > 0
        crosses_stages = self._has_lane and config.pipeline_model_parallel_size > 1
        self._receives_lane = crosses_stages and not pre_process
        self._sends_lane = crosses_stages and not post_process
        to_mtp = self._has_lane and submodules.mtp_block_spec is not None
        if (self._sends_lane or to_mtp) and len(self.layers) > 0:
            self.layers[-1].lane_width = self._num_experts
        if to_mtp:
            _keep_lane_around_norm(self.final_layernorm, config.hidden_size)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Same as `TransformerBlock.forward`; [s, b, D + lane columns] but on the last stage."""
        lane = None
        if self._receives_lane:
            # Not in `set_input_tensor`: the combined schedule calls that before the tensor is here.
            received, lane = unpack(self.input_tensor, self.config.hidden_size)
            self.set_input_tensor(received)
        output: Tensor = super().forward(hidden_states, *args, context=lane, **kwargs)
        if self._sends_lane and len(self.layers) == 0:
            # A stage of embeddings only, or an empty one: no layer packs the lane.
            output = pack(output, no_logits(output, self._num_experts) if lane is None else lane)
        return output

    def with_lane(self, hidden_states: Tensor) -> Tensor:
        """[s, b, D + lane columns] input of the first layer in the combined schedule.

        `hidden_states` are [s, b, D] embeddings, or the input from the stage before, lane included.
        """
        if self._receives_lane or not self._has_lane:
            return hidden_states
        return pack(hidden_states, no_logits(hidden_states, self._num_experts))


@contextmanager
def hybrid_arguments(
    config: TransformerConfig,
    spec: TransformerBlockSubmodules,
    moepp: MoEPPConfig,
    mtp_block_spec: MultiTokenPredictionBlockSubmodules | None,
    vp_stage: int | None,
) -> Iterator[dict[str, Any]]:
    """Arguments by which HybridModel, built in the block, has whole layers with the lane."""
    sizes = {name: getattr(config, name) for name in _SIZES}
    stack = ModuleSpec(
        module=_MoEPPStack,
        params={"spec": spec, "moepp": moepp, "sizes": sizes, "vp_stage": vp_stage},
        submodules=HybridStackSubmodules(mtp_block_spec=mtp_block_spec),
    )
    pattern = _whole_layers(config, 0 if mtp_block_spec is None else config.mtp_num_layers)
    with replaced(config, **dict.fromkeys(_SIZES)):
        yield {"hybrid_stack_spec": stack, "hybrid_layer_pattern": pattern, "vp_stage": vp_stage}


def _whole_layers(config: TransformerConfig, mtp_depths: int) -> str:
    """HybridModel's pattern: `E` for a layer with experts, `-` without; `|` ends a stage."""
    letters = [Symbols.MOE if is_moe else Symbols.MLP for is_moe in moe_layer_pattern(config)]
    chunks = config.virtual_pipeline_model_parallel_size
    stages = [
        "".join(of_stage(letters, config, chunk, rank))
        for chunk in ([None] if chunks is None else range(chunks))
        for rank in range(config.pipeline_model_parallel_size)
    ]
    return Symbols.PIPE.join(stages) + (Symbols.MTP_SEPARATOR + letters[-1]) * mtp_depths


def _keep_lane_around_norm(norm: torch.nn.Module, hidden_size: int) -> None:
    """Apply the final norm to the hidden states, not to the lane that MTP's layers take."""
    lanes: list[Tensor] = []

    def unpack_lane(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden_states, lane = unpack(arguments[0], hidden_size)
        lanes.append(lane)
        return (hidden_states,)

    def pack_lane(_: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return pack(output, lanes.pop())

    norm.register_forward_pre_hook(unpack_lane)
    norm.register_forward_hook(pack_lane)
