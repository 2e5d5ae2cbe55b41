"""A GPT model with MoE++ layers on megatron-core's HybridModel."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.model.multi_token_loss import MultiTokenLoss
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.lane import lane_columns, unpack
from moepp_megatron.moe.overlap import MoEPPChunkPlan
from moepp_megatron.moe.stack import hybrid_arguments
from moepp_megatron.moe.token_tags import TokenTags
from moepp_megatron.moe.zero_computation import share_constants


class MoEPPGPTModel(HybridModel):
    """A pipeline stage (or the whole) of a GPT model with MoE++ layers.

    `moe.stack` has its layers and hands on the lane. megatron-core's combined schedule calls
    `_preprocess` and `_postprocess`. `token_tags` computes the tags that routers get. With
    `fuses_cross_entropy` the loss is `moe.kernels.cross_entropy`, else megatron-core's as
    `TransformerConfig.cross_entropy_loss_fusion` says.

    Raises:
        ValueError: If layers on several stages are to share their constants, or HybridModel lacks
            what a setting asks for.
    """

    token_tags: TokenTags | None = None
    fuses_cross_entropy = False

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: TransformerBlockSubmodules,
        vocab_size: int,
        max_sequence_length: int,
        *,
        moepp: MoEPPConfig,
        mtp_block_spec: MultiTokenPredictionBlockSubmodules | None = None,
        position_embedding_type: str = "learned_absolute",
        rope_scaling: bool = False,
        rope_scaling_factor: float = 8.0,
        vp_stage: int | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_lacking(config, moepp, position_embedding_type)
        with hybrid_arguments(
            config, transformer_layer_spec, moepp, mtp_block_spec, vp_stage
        ) as whole_layers:
            super().__init__(
                config,
                vocab_size=vocab_size,
                max_sequence_length=max_sequence_length,
                position_embedding_type=position_embedding_type,
                **whole_layers,
                **kwargs,
            )
        if hasattr(self, "rotary_pos_emb"):
            # HybridModel hands on neither.
            rope = self.rotary_pos_emb
            rope.rotary_interleaved = config.rotary_interleaved
            if rope_scaling and position_embedding_type == "rope":
                rope.inv_freq = rope._apply_scaling(rope.inv_freq, factor=rope_scaling_factor)
        self.moepp = moepp
        self.mtp_loss = MultiTokenLoss()
        if moepp.constants_shared:
            share_constants(self)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        *,
        sources: Tensor | None = None,
        loss_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        output_processor: Callable[..., Tensor] | None = None,
        output_processor_context: Any = None,
    ) -> Tensor:
        """Compute [b, s] losses of `labels` [b, s], or [b, s, V / tp] logits where there are none.

        All stages but the last return [s, b, D + lane columns]. `sources` are the [b, s] data
        sources of the tokens, for the tags, or None for one; the rest is as in megatron-core.
        """
        given: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "packed_seq_params": packed_seq_params,
            "runtime_gather_output": runtime_gather_output,
        }
        if inference_context is not None:
            inference = {"decoder_input": decoder_input, "inference_context": inference_context}
            generated: Tensor = super().forward(**given, **inference, padding_mask=padding_mask)
            return generated
        if self.config.fine_grained_activation_offloading:
            self.preprocess_for_fine_grained_offloading()
        decoder_input, rotary_pos_emb, *_, part_of_mask = self._preprocess(
            input_ids, position_ids, decoder_input, packed_seq_params, padding_mask
        )
        tags = None
        if self.token_tags is not None:
            tags = self.token_tags(input_ids, self.config.sequence_parallel, sources)
        hidden_states = self.decoder(
            hidden_states=decoder_input,
            attention_mask=attention_mask,
            context_mask=tags,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            padding_mask=part_of_mask,
        )
        return self._postprocess(
            hidden_states,
            **given,
            decoder_input=decoder_input,
            rotary_pos_emb=rotary_pos_emb,
            loss_mask=loss_mask,
            padding_mask=padding_mask,
            tags=tags,
            output_processor=output_processor,
            output_processor_context=output_processor_context,
        )

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, Tensor | None]:
        """Embed tokens on the first stage; returns what `GPTModel._preprocess` does in training."""
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
            group = self.pg_collection.tp
            if self.config.sequence_parallel and not self.embedding.scatter_to_sequence_parallel:
                decoder_input = scatter_to_sequence_parallel_region(decoder_input, group=group)
            if self.config.sequence_parallel and padding_mask is not None:
                padding_mask = scatter_to_sequence_parallel_region(
                    padding_mask.T.contiguous(), group=group
                )
                padding_mask = padding_mask.T.contiguous()
        rotary_pos_emb = None
        if hasattr(self, "rotary_pos_emb"):
            packed = packed_seq_params
            length = self.rotary_pos_emb.get_rotary_seq_len(
                None, self.decoder, decoder_input, self.config, packed
            )
            rotary_pos_emb = self.rotary_pos_emb(
                length,
                packed_seq=packed is not None and packed.qkv_format == "thd",
                cp_group=None if packed is None else packed.cp_group,
            )
            if isinstance(rotary_pos_emb, tuple):
                # YaRN's, with a scale that attention computes itself.
                rotary_pos_emb = rotary_pos_emb[0]
        return decoder_input, rotary_pos_emb, None, None, None, padding_mask

    def _postprocess(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        *,
        runtime_gather_output: bool | None = None,
        output_processor: Callable[..., Tensor] | None = None,
        output_processor_context: Any = None,
        **given: Any,
    ) -> Tensor:
        """Compute losses or logits from the hidden states; without gradients MTP is skipped."""
        if self.mtp_process:
            hidden_states = self._with_mtp_loss(hidden_states, labels, loss_mask, **given)
        if not self.post_process:
            return hidden_states
        weight = self._output_weight()
        if output_processor is not None:
            names = "input_ids position_ids attention_mask decoder_input packed_seq_params"
            return output_processor(
                hidden_states=hidden_states,
                output_layer=self.output_layer,
                output_weight=weight,
                labels=labels,
                loss_mask=loss_mask,
                inference_context=None,
                runtime_gather_output=runtime_gather_output,
                context=output_processor_context,
                compute_language_model_loss=self.compute_language_model_loss,
                scale_logits=self._scale_logits,
                config=self.config,
                **{name: given[name] for name in names.split()},
            )
        logits, _ = self.output_layer(
            hidden_states, weight=weight, runtime_gather_output=runtime_gather_output
        )
        logits = self._scale_logits(logits)
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)

    def _with_mtp_loss(
        self, hidden_states: Tensor, labels: Tensor | None, loss_mask: Tensor | None, **given: Any
    ) -> Tensor:
        """[s, b, D] hidden states without the lane, with the gradient of MTP's loss."""
        mtp_states: list[Tensor] = []
        if labels is not None and torch.is_grad_enabled():
            names = "input_ids position_ids attention_mask rotary_pos_emb packed_seq_params"
            hidden_states = self.mtp(
                hidden_states=hidden_states,
                embedding=self.embedding,
                context_mask=given["tags"],
                padding_mask=given["padding_mask"],
                **{name: given[name] for name in names.split()},
            )
            hidden_states, *mtp_states = hidden_states.chunk(1 + self.config.mtp_num_layers)
        if lane_columns(self.moepp, self.config.params_dtype) > 0:
            size = self.decoder.config.hidden_size
            hidden_states, _ = unpack(hidden_states, size)
            mtp_states = [unpack(states, size)[0] for states in mtp_states]
        if labels is None or not mtp_states:
            return hidden_states
        return self.mtp_loss.attach(
            hidden_states,
            mtp_states,
            labels,
            loss_mask,
            self._losses_of,
            self.config,
            self.pg_collection.cp,
        )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """[b, s] fp32 cross entropy of each token.

        Args:
            labels: [b, s] int64; the loss of an id that is not in the vocabulary is to be masked.
            logits: [s, b, V / tp] this rank's columns. The backward pass of the fused kernels
                writes the gradient over them.
        """
        if not self.fuses_cross_entropy:
            loss: Tensor = super().compute_language_model_loss(labels, logits)
            return loss
        from moepp_megatron.moe.kernels.cross_entropy import cross_entropy

        labels = labels.transpose(0, 1).contiguous()
        return cross_entropy(logits, labels, self.tp_group).transpose(0, 1).contiguous()

    def _losses_of(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """[b, s] cross entropy of labels [b, s] from hidden states [s, b, D]."""
        logits, _ = self.output_layer(hidden_states, weight=self._output_weight())
        return self.compute_language_model_loss(labels, logits)

    def _output_weight(self) -> Tensor | None:
        if not self.share_embeddings_and_output_weights:
            return None
        weight: Tensor = self.shared_embedding_or_output_weight()
        return weight

    def build_schedule_plan(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> MoEPPChunkPlan:
        """This chunk as nodes of the combined schedule; arguments as `forward`."""
        if self.config.fine_grained_activation_offloading:
            self.preprocess_for_fine_grained_offloading()
        return MoEPPChunkPlan(self, input_ids, position_ids, attention_mask, **kwargs)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Same as HybridModel's, without an empty entry that GPT checkpoints do not have."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, *args, **kwargs)
        extra = state.pop(f"{prefix}output_layer._extra_state", None)
        assert extra is None or not extra.data, "the output layer has no state beside its weight"
        return state


def _refuse_lacking(
    config: TransformerConfig, moepp: MoEPPConfig, position_embedding_type: str
) -> None:
    """Refuse what a stage cannot have (ValueError)."""
    stages = config.pipeline_model_parallel_size
    if moepp.constants_shared and stages > 1:
        raise ValueError(
            f"constants_shared (True) must be False with pipeline_model_parallel_size "
            f"({stages}), because no stage sees all layers' gradients; use one stage or False"
        )
    embedding = position_embedding_type
    asked = {
        f"position_embedding_type ({embedding})": embedding == "mrope",
        "defer_embedding_wgrad_compute (True)": config.defer_embedding_wgrad_compute,
        "fp8_output_proj (True)": config.fp8_output_proj,
    }
    for setting, is_asked in asked.items():
        if is_asked:
            raise ValueError(
                f"{setting} must not be given, because megatron-core's HybridModel does not have "
                "it; leave it out"
            )
