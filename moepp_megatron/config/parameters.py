"""Exact parameter counts from the configuration, before any model is built."""

from dataclasses import dataclass

from moepp_megatron.config.schema import Config, ModelSection
from moepp_megatron.experts import FFN


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the whole model, over all ranks; each part is summed over its layers.

    Attributes:
        embedding: Token embedding [V, D] and, unless tied, output layer [V, D].
        mtp_parameters: Three norms [D] and the projection [D, 2D] of each layer of multi-token
            prediction. The ordinary layers inside count in the parts below as the decoder's.
        attention: Query, key, value and output projections, query/key norms.
        norms: RMSNorm weights: two per layer and the final one.
        dense_ffn: SwiGLU FFNs of dense layers.
        ffn_experts: All FFN experts.
        shared_experts: Experts that every token takes.
        router: Gates W and gating residuals G.
        zero_computation_experts: Constant experts' v_c [D] (once under `moe.constants_shared`)
            and U_c [2, D].
        per_ffn_expert: One FFN expert of one layer.
        active: Parameters that a token uses in training on average when the balance loss is at its
            optimum: all outside the experts, K phi FFN experts and K (1 - phi) zero-computation
            experts per MoE layer, spread evenly over their kind (v_c counted in each layer, shared
            or not).
    """

    embedding: int
    mtp_parameters: int
    attention: int
    norms: int
    dense_ffn: int
    ffn_experts: int
    shared_experts: int
    router: int
    zero_computation_experts: int
    per_ffn_expert: int
    active: int

    @property
    def parts(self) -> dict[str, int]:
        """All parameters, by the part that they are in."""
        return {key: n for key, n in vars(self).items() if key not in ("per_ffn_expert", "active")}

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parts.values())


def checkpoint_bytes(config: Config) -> int:
    """Return a checkpoint's bytes: fp32 weights, two Adam moments, and bf16 weights under bf16."""
    per_parameter = 12 + {"fp32": 0, "bf16": 2}[config.precision.dtype]
    return count_parameters(config).total * per_parameter


def count_parameters(config: Config) -> ParameterCounts:
    """Count a model of SwiGLU FFNs, RMSNorm and no biases but those of `model.qkv_bias`."""
    model, moe = config.model, config.moe
    width, layers = model.hidden_size, len(config.router_pattern)
    moe_layers = sum(config.router_pattern)
    per_ffn_expert = FFN.parameters(width, config.expert_ffn_hidden_size)
    is_first = [layer == 0 for layer in range(moe_layers)]
    parts = {
        "embedding": model.vocab_size * width * (1 if model.tie_embeddings else 2),
        "mtp_parameters": model.mtp_num_layers * (3 * width + 2 * width * width),
        "attention": layers * _attention_parameters(config),
        "norms": (2 * layers + 1) * width,
        "dense_ffn": (layers - moe_layers) * 3 * width * model.ffn_hidden_size,
        "shared_experts": moe_layers
        * width
        * (3 * (moe.shared_expert_ffn_hidden_size or 0) + moe.shared_expert_gate),
        "router": sum(moe.router_parameters(width, is_first=first) for first in is_first),
    }
    ffn_experts = moe_layers * moe.num_ffn_experts * per_ffn_expert
    unshared = moe_layers * moe.local_parameters(width, is_first=True)
    taken_ffn = moe.router_topk * moe.ffn_share
    taken_zero_computation = moe.router_topk - taken_ffn
    active = sum(parts.values()) + ffn_experts * taken_ffn / moe.num_ffn_experts
    if moe.num_zero_computation_experts:
        active += unshared * taken_zero_computation / moe.num_zero_computation_experts
    return ParameterCounts(
        **parts,
        ffn_experts=ffn_experts,
        zero_computation_experts=sum(
            moe.local_parameters(width, is_first=first) for first in is_first
        ),
        per_ffn_expert=per_ffn_expert,
        active=round(active),
    )


def _attention_parameters(config: Config) -> int:
    """One layer's attention: Q and output [heads * d, D], K and V [groups * d, D], norms [d]."""
    model = config.model
    if model.latent_attention is not None:
        matrices = sum(rows * columns for rows, columns in latent_matrices(model))
        latent = model.latent_attention
        # Of the compressed vectors.
        norms = (latent.q_lora_rank or 0) + latent.kv_lora_rank
        return matrices + (norms if model.qk_layernorm else 0)
    projections = 2 * (model.num_attention_heads + model.query_groups) * model.head_dim
    heads = {"head": 2, "all_heads": model.num_attention_heads + model.query_groups}
    norms = heads[model.qk_layernorm_scope] * model.head_dim if model.qk_layernorm else 0
    biases = (model.num_attention_heads + 2 * model.query_groups) * model.head_dim
    return projections * model.hidden_size + norms + (biases if model.qkv_bias else 0)


def latent_matrices(model: ModelSection) -> list[tuple[int, int]]:
    """Rows and columns of the projections of a layer with latent attention.

    Source: arXiv 2405.04434, section 2.1: compression and expansion of queries (or queries from
    the input), of keys and values with the shared key of positions, and the output.
    """
    latent, heads = model.latent_attention, model.num_attention_heads
    assert latent is not None, "the model has latent attention"
    width, queries, keys = model.hidden_size, heads * latent.qk_dim, latent.kv_lora_rank
    rank = latent.q_lora_rank
    from_input = [(queries, width)] if rank is None else [(rank, width), (queries, rank)]
    return [
        *from_input,
        (keys + latent.qk_pos_emb_head_dim, width),
        (heads * (latent.qk_head_dim + latent.v_head_dim), keys),
        (width, heads * latent.v_head_dim),
    ]
