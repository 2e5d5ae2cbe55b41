"""The workload in plain numbers: the model, its routing, its batch, its number formats."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from moepp_megatron.config import Config
from moepp_megatron.experts import ExpertLayout
from moepp_megatron.workbench.planning.attention import Attention, LatentAttention, attention_of
from moepp_megatron.workbench.planning.grid import Dispatcher


@dataclass(frozen=True, kw_only=True)
class Experts(ExpertLayout):
    """The experts of an MoE layer and how tokens choose them.

    Attributes:
        ffn_share: Share of the selections that FFN experts get, phi.
        ffn_size: Inner width of an FFN expert.
        shared_size: Inner width of the shared expert, 0 for none.
        shared_gate: Whether a gate weighs the shared expert's output.
        dispatcher: How tokens reach their experts.
        permute_fused: Tokens are permuted by fused kernels.
        router_pads: The router gives each FFN expert as many tokens as FP8 products take.
        has_bias: FFN experts have biases.
        is_clamped: The two halves of the first product are clamped before the activation.
        most_nodes: A token's experts lie on at most so many nodes; None for any.
        num_groups: Groups of neighbouring FFN experts.
        group_topk: Groups that a token's FFN experts come from.
    """

    ffn_share: float
    ffn_size: int
    shared_size: int = 0
    shared_gate: bool = False
    dispatcher: Dispatcher = "alltoall"
    permute_fused: bool = True
    router_pads: bool = False
    has_bias: bool = False
    is_clamped: bool = False
    most_nodes: int | None = None
    num_groups: int = 1
    group_topk: int = 1

    def most_nodes_of(self, nodes: int) -> int | None:
        """Most nodes that a token goes to where FFN experts lie on `nodes` nodes; None for any.

        As many groups as nodes, or more, are on one node each; of fewer each is on several.
        """
        if self.most_nodes is not None or self.group_topk == self.num_groups:
            return self.most_nodes
        return self.group_topk * max(1, -(-nodes // self.num_groups))

    @property
    def ffn_per_token(self) -> float:
        """FFN experts per token on average, K phi."""
        return self.router_topk * self.ffn_share


@dataclass(frozen=True)
class Numbers:
    """Number formats.

    Attributes:
        dtype: Dtype of parameters and activations.
        fp8: FP8 scaling of the matrix products, or None.
        fp8_weights: Whether weights exist only in FP8.
        moments_bytes: Bytes of Adam's two moments of a weight.
        gradient_bytes: Bytes of a gradient in the buffer that is reduced.
        matrix_moments_bytes: The same of a weight of a matrix, of which Muon and Lion keep one.
    """

    dtype: Literal["fp32", "bf16"] = "bf16"
    fp8: str | None = None
    fp8_weights: bool = False
    moments_bytes: int = 8
    gradient_bytes: int = 4
    matrix_moments_bytes: int = 8

    @property
    def row_alignment(self) -> int:
        """What the rows of an expert's FP8 products are padded to a multiple of; 1 without FP8."""
        if self.fp8 is None:
            return 1
        return {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}[self.fp8]

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
        return {"fp32": 0, "bf16": 4}[self.dtype]


@dataclass(frozen=True)
class Workload:
    """A model and its batch.

    Attributes:
        hidden: D.
        vocab: Rows of the embedding table.
        seq: Tokens of a sequence.
        is_moe: For each layer, whether it is an MoE layer.
        dense_size: Inner width of the FFN of other layers.
        attention: Attention of every layer.
        experts: Experts of the MoE layers.
        tied: Whether the output layer shares the embedding's weights.
        batch: Sequences of a step.
        numbers: Number formats.
        causal_share: Share of the attention scores that are computed: half under a causal mask.
        extra_layers: MoE layers on the last stage beside `is_moe` (multi-token prediction), each
            with an output layer of its own.
        loss_fused: The cross entropy works on the logits as they are, without an fp32 copy.
        local_fused: Kernels compute the zero-computation experts (`moe.fused`).
        graphs: Parts of a layer that run as CUDA graphs, so that the host does not issue them one
            by one: attn, mlp, moe_router, moe_preprocess, moe, full_iteration.
        gated: FFNs of dense layers have a gate: three matrices instead of two.
        delays_gradients: The combined schedule computes the weights' gradients last.
        rotation_fused: One kernel rotates queries, and one keys.
        tensor_overlap: Tensor-parallel gathers and reduce-scatters run chunk by chunk beside their
            products (Transformer Engine's user buffers).
    """

    hidden: int
    vocab: int
    seq: int
    is_moe: tuple[bool, ...]
    dense_size: int
    attention: Attention
    experts: Experts
    tied: bool
    batch: int
    numbers: Numbers
    causal_share: float = 0.5
    extra_layers: int = 0
    loss_fused: bool = False
    local_fused: bool = False
    graphs: frozenset[str] = frozenset()
    gated: bool = True
    delays_gradients: bool = False
    rotation_fused: bool = True
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
            numbers=Numbers(
                precision.dtype,
                precision.recipe,
                precision.fp8_param,
                gradient_bytes=precision.gradient_bytes,
                moments_bytes=moments,
                matrix_moments_bytes=4 if config.optimizer.is_emerging else moments,
            ),
            # What `runtime.kernel_choices` chooses on a GPU.
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

    def with_facts(
        self,
        *,
        gradient_bytes: int,
        moment_bytes: int,
        extra_layers: int,
        window: int | None,
        window_every: int,
        ungated_size: int | None,
        key_norm: bool,
        most_nodes: int | None,
        permute_fused: bool,
        router_pads: bool,
        expert_bias: bool,
        clamped: bool,
        rotation_fused: bool,
        tensor_overlap: bool,
    ) -> Workload:
        """The same model with what no configuration says (`measured.rows.Beyond`)."""
        attention = self.attention
        if key_norm and isinstance(attention, LatentAttention):
            attention = replace(attention, has_norms=True)
        return replace(
            self,
            attention=attention,
            numbers=replace(
                self.numbers,
                gradient_bytes=gradient_bytes,
                moments_bytes=2 * moment_bytes,
                matrix_moments_bytes=2 * moment_bytes,
            ),
            extra_layers=extra_layers or self.extra_layers,
            causal_share=_seen_share(self.seq, window, window_every),
            # Whose kernels these runs had is not known of all of them.
            loss_fused=False,
            dense_size=ungated_size or self.dense_size,
            gated=ungated_size is None,
            rotation_fused=rotation_fused,
            tensor_overlap=tensor_overlap,
            experts=replace(
                self.experts,
                most_nodes=most_nodes,
                permute_fused=permute_fused,
                router_pads=router_pads,
                has_bias=expert_bias,
                is_clamped=clamped,
            ),
        )

    def with_dispatcher(self, dispatcher: Dispatcher) -> Workload:
        """The same model with another dispatcher."""
        return replace(self, experts=replace(self.experts, dispatcher=dispatcher))

    def at_share(self, ffn_share: float) -> Workload:
        """The same model with this share of selections on FFN experts."""
        return replace(self, experts=replace(self.experts, ffn_share=ffn_share))


def _seen_share(seq: int, window: int | None, every: int) -> float:
    """Share of a layer's scores that are computed, over layers of which every n-th has a window."""
    seen = min(window or seq, seq)
    # The first `seen` tokens see all before them, later ones `seen`.
    windowed = seen / seq - (seen / seq) ** 2 / 2
    return windowed / every + 0.5 * (1 - 1 / every)


def _experts(config: Config) -> Experts:
    moe = config.moe
    return Experts(
        **{field.name: getattr(moe, field.name) for field in fields(ExpertLayout)},
        ffn_share=moe.ffn_share,
        ffn_size=config.expert_ffn_hidden_size,
        shared_size=moe.shared_expert_ffn_hidden_size or 0,
        shared_gate=moe.shared_expert_gate,
        num_groups=moe.num_groups,
        group_topk=moe.group_topk,
        dispatcher=moe.dispatcher,
    )
