"""GPTModel with the lane of router logits across pipeline stages."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.model.cross_entropy import WithCrossEntropy
from moepp_megatron.model.multi_token_loss import MultiTokenLoss
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.lane import lane_columns, no_logits, pack, unpack
from moepp_megatron.moe.multi_token import keep_lane_around_norm
from moepp_megatron.moe.overlap import MoEPPChunkPlan
from moepp_megatron.moe.token_tags import TokenTags
from moepp_megatron.moe.zero_computation import share_constants
from moepp_megatron.runtime.patches import replaced


class MoEPPGPTModel(WithCrossEntropy, GPTModel):
    """A pipeline stage (or the whole) of a GPT model with MoE++ layers.

    A stage that is not the first receives hidden states packed with the lane and unpacks them; a
    stage that is not the last packs them again. Between them the lane is
    `TransformerBlock`'s `context` argument. `token_tags` computes the tags that routers get.

    Raises:
        ValueError: If layers on several stages are to share their constants.
    """

    token_tags: TokenTags | None = None

    def __init__(
        self, config: TransformerConfig, *args: Any, moepp: MoEPPConfig, **kwargs: Any
    ) -> None:
        stages = config.pipeline_model_parallel_size
        if moepp.constants_shared and stages > 1:
            raise ValueError(
                f"constants_shared (True) must be False with pipeline_model_parallel_size "
                f"({stages}), because no stage sees all layers' gradients; use one stage or False"
            )
        super().__init__(config, *args, **kwargs)
        self.moepp = moepp
        self.mtp_loss = MultiTokenLoss()
        if moepp.constants_shared:
            share_constants(self)
        # Not read from `self.config` later: whoever wraps this model may give that the wider shape
        # of what stages exchange (`moepp_megatron.moe.lane.pipeline_config`).
        self.hidden_size = config.hidden_size
        crosses_stages = config.pipeline_model_parallel_size > 1 and (
            lane_columns(moepp, config.params_dtype) > 0
        )
        self._receives_lane = crosses_stages and not self.pre_process
        self._sends_lane = crosses_stages and not self.post_process
        self._mtp_has_lane = self.mtp_process and lane_columns(moepp, config.params_dtype) > 0
        if (self._sends_lane or self._mtp_has_lane) and len(self.decoder.layers) > 0:
            self.decoder.layers[-1].lane_width = moepp.num_experts
        if self._mtp_has_lane:
            keep_lane_around_norm(self.decoder.final_layernorm, self.hidden_size)

    def forward(self, *args: Any, sources: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Same as `GPTModel.forward`; all stages but the last return [s, b, D + lane columns].

        `sources` are the [b, s] data sources of the tokens, for the tags; None where there is one.
        """
        lane = None
        if self._receives_lane:
            # Not in `set_input_tensor`: the combined schedule calls that before the tensor is here.
            received = self.decoder.input_tensor
            hidden_states, lane = unpack(received, self.hidden_size)
            self.set_input_tensor(hidden_states)
        block_kwargs = {"context": lane}
        if self.token_tags is not None:
            block_kwargs["context_mask"] = self.token_tags(
                args[0], self.config.sequence_parallel, sources
            )
        output = super().forward(*args, extra_block_kwargs=block_kwargs, **kwargs)
        if self._sends_lane and len(self.decoder.layers) == 0:
            # A stage of embeddings only, or an empty one: no layer packs the lane.
            if lane is None:
                lane = no_logits(output, self.moepp.num_experts)
            output = pack(output, lane)
        return output

    def _postprocess(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Same as `GPTModel._postprocess`, with our MTP loss; without gradients MTP is skipped."""
        if not self.mtp_process:
            return super()._postprocess(hidden_states, labels=labels, loss_mask=loss_mask, **kwargs)
        mtp_states: list[Tensor] = []
        if labels is not None and torch.is_grad_enabled():
            hidden_states = self._mtp_hidden_states(hidden_states, **kwargs)
            hidden_states, *mtp_states = hidden_states.chunk(1 + self.config.mtp_num_layers)
        if self._mtp_has_lane:
            hidden_states, _ = unpack(hidden_states, self.hidden_size)
            mtp_states = [unpack(states, self.hidden_size)[0] for states in mtp_states]
        if labels is not None and mtp_states:
            hidden_states = self.mtp_loss.attach(
                hidden_states,
                mtp_states,
                labels,
                loss_mask,
                self._losses_of,
                self.config,
                self.pg_collection.cp,
            )
        kwargs["mtp_in_postprocess"] = False
        # Otherwise megatron-core would attach its own loss of the same tokens.
        with replaced(self.config, mtp_num_layers=None):
            return super()._postprocess(hidden_states, labels=labels, loss_mask=loss_mask, **kwargs)

    def _mtp_hidden_states(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[(1 + depths) * s, b, D + lane columns] hidden states, the given ones first."""
        names = ("input_ids", "position_ids", "attention_mask", "rotary_pos_emb")
        tags = (kwargs["extra_block_kwargs"] or {}).get("context_mask")
        mtp_states: Tensor = self.mtp(
            hidden_states=hidden_states,
            embedding=self.embedding,
            extra_block_kwargs={"context_mask": tags},
            packed_seq_params=kwargs["packed_seq_params"],
            padding_mask=self._whole_mask(kwargs["padding_mask"], kwargs["input_ids"]),
            **{name: kwargs[name] for name in names},
        )
        return mtp_states

    def _whole_mask(self, padding_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
        """[b, s] the mask, of which a first stage has cut out this rank's part of the sequence."""
        if padding_mask is None or padding_mask.shape == input_ids.shape:
            return padding_mask
        gathered = gather_from_sequence_parallel_region(
            padding_mask.T.contiguous(), tensor_parallel_output_grad=False, group=self.tp_group
        )
        return gathered.T

    def _losses_of(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """[b, s] cross entropy of labels [b, s] from hidden states [s, b, D]."""
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else None
        logits, _ = self.output_layer(hidden_states, weight=weight)
        return self.compute_language_model_loss(labels, logits)

    def build_schedule_plan(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> MoEPPChunkPlan:
        """This chunk as nodes of the combined schedule; arguments as `forward`."""
        if self.config.fine_grained_activation_offloading:
            self.preprocess_for_fine_grained_offloading()
        return MoEPPChunkPlan(self, input_ids, position_ids, attention_mask, **kwargs)

    def with_lane(self, hidden_states: Tensor) -> Tensor:
        """[s, b, D + lane columns] input of this chunk's first layer in the combined schedule.

        `hidden_states` are [s, b, D] embeddings, or the input from the stage before, lane included.
        """
        if self._receives_lane or lane_columns(self.moepp, self.config.params_dtype) == 0:
            return hidden_states
        return pack(hidden_states, no_logits(hidden_states, self.moepp.num_experts))
