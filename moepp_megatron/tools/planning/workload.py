"""The workload in plain numbers: the model, its routing, its batch, its number formats."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from moepp_megatron.config import Config
from moepp_megatron.experts import ExpertLayout
from moepp_megatron.tools.planning.grid import Dispatcher
from moepp_megatron.tools.planning.imbalance import LEARNED


@dataclass(frozen=True)
class _Matmul:
    """A weight [outputs, inputs] of one rank and the tokens that it sees."""

    outputs: int  # rows of the weight on this rank
    inputs: int  # columns of the weight on this rank
    # Whether it is whole on every tensor-parallel rank and sees the rank's own share of a sequence.
    is_sequence_parallel: bool = False
    is_up_projection: bool = False  # whether it expands a compressed vector (`mla_up_proj`)


@dataclass(frozen=True)
class _GroupedQuery:
    """Grouped-query attention (arXiv 2305.13245). Sizes are of one tensor-parallel rank of `tp`."""

    heads: int  # query heads
    groups: int  # key/value heads
    head_dim: int  # width of a head
    has_qk_norm: bool = False  # RMSNorm of queries and keys
    has_bias: bool = False  # queries, keys and values have biases
    norm_spans_heads: bool = False  # the norms are over all heads at once, not per head

    @property
    def qk_dim(self) -> int:
        """Width of a query and of a key of one head."""
        return self.head_dim

    @property
    def v_dim(self) -> int:
        """Width of a value of one head."""
        return self.head_dim

    def matmuls(self, hidden: int, tp: int) -> tuple[_Matmul, ...]:
        """One product for queries, keys and values, one for the output."""
        return _Matmul(self._projected(tp), hidden), _Matmul(hidden, self._query(tp))

    def norm_parameters(self) -> int:
        """Weights of the query and key norms, whole on every rank."""
        heads = self.heads + self.groups if self.norm_spans_heads else 2
        return heads * self.head_dim if self.has_qk_norm else 0

    def bias_parameters(self, tp: int) -> int:
        """Biases of the queries, keys and values of this rank's heads."""
        return self._projected(tp) if self.has_bias else 0

    def gathered_width(self, hidden: int) -> int:
        """Channels per token that ranks gather before the projections: the layer's input."""
        return hidden

    def kept_width(self, tp: int) -> int:
        """Channels kept for the backward pass: queries, keys, values, output, and before norms."""
        # The norms keep copies: of the projection queries and keys are views with gaps.
        normed = self._query(tp) + self._key(tp) if self.has_qk_norm else 0
        return 2 * self._query(tp) + 2 * self._key(tp) + normed

    def exchanged_width(self, tp: int) -> int:
        """Channels per token of the keys and values that context-parallel ranks exchange."""
        return 2 * self._key(tp)

    def _projected(self, tp: int) -> int:
        """Rows of this rank's projection of queries, keys and values."""
        # Also with fewer key/value heads than ranks each projects its share of all rows: ranks
        # gather the rows of the heads that they share.
        return (self.heads + 2 * self.groups) * self.head_dim // tp

    def _query(self, tp: int) -> int:
        return self.heads // tp * self.head_dim

    def _key(self, tp: int) -> int:
        # With fewer key/value heads than ranks, ranks share one.
        return max(self.groups // tp, 1) * self.head_dim


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1), sizes as in `_GroupedQuery`.

    With Transformer Engine's modules, compressions are whole on every tensor-parallel rank and see
    its own tokens; their results are gathered, expansions are split over the ranks.
    """

    heads: int
    query_rank: int | None  # width of the compressed query; None where queries come from the input
    key_rank: int  # width of the compressed keys and values
    plain_dim: int  # width of a head's query and key without position
    rotary_dim: int  # width of the part with position, shared by all heads' keys
    v_dim: int  # width of a value
    has_norms: bool = True  # the compressed vectors are normalised

    @property
    def qk_dim(self) -> int:
        """Width of a query and of a key of one head."""
        return self.plain_dim + self.rotary_dim

    def matmuls(self, hidden: int, tp: int) -> tuple[_Matmul, ...]:
        """Compressions and expansions of queries and of keys and values, the output."""
        heads = self.heads // tp
        queries, keys = heads * self.qk_dim, heads * (self.plain_dim + self.v_dim)
        compressed = self._compression(self.key_rank + self.rotary_dim, hidden, tp)
        expanded = _Matmul(keys, self.key_rank, is_up_projection=True)
        output = _Matmul(hidden, heads * self.v_dim)
        if self.query_rank is None:
            query = _Matmul(queries, hidden, is_up_projection=True)
            return query, compressed, expanded, output
        down = self._compression(self.query_rank, hidden, tp)
        up = _Matmul(queries, self.query_rank, is_up_projection=True)
        return down, compressed, up, expanded, output

    def _compression(self, width: int, hidden: int, tp: int) -> _Matmul:
        return _Matmul(width, hidden, is_sequence_parallel=True)

    def norm_parameters(self) -> int:
        """Norms of the compressed vectors."""
        return (self.query_rank or 0) + self.key_rank if self.has_norms else 0

    def bias_parameters(self, tp: int) -> int:
        """Parameters of biases: none."""
        return 0

    def gathered_width(self, hidden: int) -> int:
        """The compressed vectors, the input in place of a query that is not compressed."""
        queries = hidden if self.query_rank is None else self.query_rank
        return queries + self.key_rank + self.rotary_dim

    def kept_width(self, tp: int) -> int:
        """Queries, keys, values, output of the core, and the compressed vectors."""
        heads_width = self.heads // tp * (2 * self.qk_dim + 2 * self.v_dim)
        return heads_width + self.gathered_width(0)

    def exchanged_width(self, tp: int) -> int:
        """Keys and values."""
        return self.heads // tp * (self.qk_dim + self.v_dim)


Attention = _GroupedQuery | LatentAttention


def _attention_of(config: Config) -> Attention:
    """The attention that `config` describes, with Transformer Engine's modules."""
    model, latent = config.model, config.model.latent_attention
    if latent is not None:
        return LatentAttention(
            heads=model.num_attention_heads,
            query_rank=latent.q_lora_rank,
            key_rank=latent.kv_lora_rank,
            plain_dim=latent.qk_head_dim,
            rotary_dim=latent.qk_pos_emb_head_dim,
            v_dim=latent.v_head_dim,
            has_norms=model.qk_layernorm,
        )
    return _GroupedQuery(
        model.num_attention_heads,
        model.query_groups,
        model.head_dim,
        model.qk_layernorm,
        model.qkv_bias,
        model.qk_layernorm_scope == "all_heads",
    )


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
    static_rows: float | None = None  # rows of `moe.static_rows` for each selection

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
    # Of routing, as in `imbalance.py`; None where it is forced to balance.
    evenness: float | None = LEARNED

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
            attention=_attention_of(config),
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
    def row_bytes(self) -> int:
        """Bytes of a token's hidden vector."""
        return self.hidden * self.numbers.activation_bytes

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
        static_rows=moe.static_rows_per_selection,
    )
