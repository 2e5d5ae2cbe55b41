"""The workload in plain numbers: the model, its routing, its batch, its number formats."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from moepp_megatron.config import Config
from moepp_megatron.experts import ExpertLayout
from moepp_megatron.tools.planning.attention import Attention, attention_of
from moepp_megatron.tools.planning.grid import Dispatcher


@dataclass(frozen=True, kw_only=True)
class _ExpertShape(ExpertLayout):
    """The experts of an MoE layer and how tokens choose them."""

    ffn_share: float  # share of the selections that FFN experts get, phi
    ffn_size: int  # inner width of an FFN expert
    shared_size: int = 0  # inner width of the shared expert, 0 for none
    shared_gate: bool = False  # whether a gate weighs the shared expert's output
    dispatcher: Dispatcher = "alltoall"  # how tokens reach their experts
    permute_fused: bool = True  # tokens are permuted by fused kernels
    router_pads: bool = False  # the router gives each what FP8 products take
    flex_pads: bool = True  # so does a flex dispatcher, but for this package's with DeepEP
    has_bias: bool = False  # FFN experts have biases
    is_clamped: bool = False  # both halves of the first product are clamped
    most_nodes: int | None = None  # a token's experts lie on at most this many nodes; None for any
    num_groups: int = 1  # groups of neighbouring FFN experts
    group_topk: int = 1  # groups that a token's FFN experts come from

    def most_nodes_of(self, nodes: int) -> int | None:
        """Most nodes that a token goes to where FFN experts lie on `nodes` nodes; None for any."""
        # As many groups as nodes, or more, are on one node each; of fewer each is on several.
        if self.most_nodes is not None or self.group_topk == self.num_groups:
            return self.most_nodes
        return self.group_topk * max(1, -(-nodes // self.num_groups))

    @property
    def ffn_per_token(self) -> float:
        """FFN experts per token on average, K phi."""
        return self.router_topk * self.ffn_share


@dataclass(frozen=True)
class NumberFormats:
    """Number formats."""

    dtype: Literal["fp32", "bf16"] = "bf16"  # dtype of parameters and activations
    fp8: str | None = None  # FP8 scaling of the matrix products, or None
    fp8_weights: bool = False  # whether weights exist only in FP8
    moments_bytes: int = 8  # bytes of Adam's two moments of a weight
    gradient_bytes: int = 4  # bytes of a gradient in the buffer that is reduced
    # The same of a weight of a matrix, of which Muon and Lion keep one.
    matrix_moments_bytes: int = 8
    own_copy: int | None = None  # bytes of the optimizer's copy of a weight; None for up to fp32

    @property
    def row_alignment(self) -> int:
        """Alignment of an expert's rows in FP8; 1 without FP8."""
        aligned = {None: 1, "delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
        return aligned[self.fp8]

    @property
    def activation_bytes(self) -> int:
        """Bytes of an activation."""
        return {"fp32": 4, "bf16": 2}[self.dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight."""
        return 1 if self.fp8_weights else self.activation_bytes

    @property
    def master_bytes(self) -> int:
        """Bytes of the optimizer's own copy of a weight."""
        return {"fp32": 0, "bf16": 4}[self.dtype] if self.own_copy is None else self.own_copy


# Compared by identity: it is the key of caches.
@dataclass(frozen=True, eq=False)
class Workload:
    """A model and its batch."""

    hidden: int  # D
    vocab: int  # rows of the embedding table
    seq: int  # tokens of a sequence
    is_moe: tuple[bool, ...]  # for each layer, whether it is an MoE layer
    dense_size: int  # inner width of the FFN of other layers
    attention: Attention  # attention of every layer
    experts: _ExpertShape  # experts of the MoE layers
    tied: bool  # whether the output layer shares the embedding's weights
    batch: int  # sequences of a step
    numbers: NumberFormats  # number formats
    causal_share: float = 0.5  # share of the attention scores that are computed
    # Of multi-token prediction, on the last stage, besides `is_moe`, each with an output layer.
    extra_layers: int = 0
    loss_fused: bool = False  # the cross entropy makes no fp32 copy of the logits
    local_fused: bool = False  # kernels compute the zero-computation experts (`moe.fused`)
    # Parts of a layer that run as CUDA graphs, so that the host does not issue them one by one:
    # attn, mlp, moe_router, moe_preprocess, moe, full_iteration.
    graphs: frozenset[str] = frozenset()
    gated: bool = True  # FFNs of dense layers have a gate: three matrices instead of two
    delays_gradients: bool = False  # the combined schedule computes the weights' gradients last
    rotation_fused: bool = True  # one kernel rotates queries, and one keys
    # Tensor-parallel gathers and reduce-scatters run chunk by chunk during their products
    # (Transformer Engine's user buffers).
    tensor_overlap: bool = False

    @classmethod
    def from_config(cls, config: Config) -> Workload:
        """The workload that a checked configuration describes."""
        model, precision = config.model, config.precision
        moments = 8 - 2 * len(config.optimizer.bf16_moments)
        return cls(
            hidden=model.hidden_size,
            vocab=model.vocab_size,
            seq=model.seq_length,
            is_moe=tuple(config.moe.moe_layer_pattern(model.num_layers)),
            dense_size=model.ffn_hidden_size,
            attention=attention_of(config),
            experts=_experts(config),
            tied=model.tie_embeddings,
            batch=config.training.global_batch_size,
            extra_layers=model.mtp_num_layers,
            numbers=NumberFormats(
                precision.dtype,
                precision.recipe,
                precision.fp8_param,
                gradient_bytes=precision.gradient_bytes,
                moments_bytes=moments,
                matrix_moments_bytes=4 if config.optimizer.is_emerging else moments,
                own_copy=2 if config.optimizer.store_param_remainders else None,
            ),
            # What `runtime.backends` chooses on a GPU.
            loss_fused=precision.cross_entropy in ("auto", "fused"),
            local_fused=config.moe.fused is not False and config.moe.have_kernels,
            graphs=frozenset(config.training.cuda_graphs),
            delays_gradients=config.parallel.delay_wgrad_compute,
        )

    @property
    def layers(self) -> int:
        """Transformer layers."""
        return len(self.is_moe)

    @property
    def first_moe_layer(self) -> int:
        """The MoE layer without a gating residual; `layers` where there is none."""
        return self.is_moe.index(True) if any(self.is_moe) else self.layers

    def with_dispatcher(self, dispatcher: Dispatcher) -> Workload:
        """The same model with another dispatcher."""
        return replace(self, experts=replace(self.experts, dispatcher=dispatcher))


def _experts(config: Config) -> _ExpertShape:
    moe = config.moe
    return _ExpertShape(
        **{field.name: getattr(moe, field.name) for field in fields(ExpertLayout)},
        ffn_share=moe.ffn_share,
        ffn_size=config.expert_ffn_hidden_size,
        shared_size=moe.shared_expert_ffn_hidden_size or 0,
        shared_gate=moe.shared_expert_gate,
        num_groups=moe.num_groups,
        group_topk=moe.group_topk,
        dispatcher=moe.dispatcher,
        flex_pads=moe.flex_backend == "hybridep",
    )
