"""Floating-point operations of training, counted from the configuration.

The count follows the definition of model FLOPs utilisation (MFU) in PaLM (arXiv 2204.02311,
appendix B): without recomputation; with every score of attention, although half are masked; 2 FLOP
per weight and token forward, twice that backward. Only the FFN experts that tokens selected count,
so that skipped work does not raise the MFU.
"""

from moepp_megatron.config.parameters import latent_matrices
from moepp_megatron.config.schema import Config
from moepp_megatron.experts import FFN

# Gradients of the inputs and of the weights cost a forward pass each.
_FORWARD_AND_BACKWARD = 3


def training_flops_per_token(config: Config, ffn_fraction: float) -> float:
    """Return the FLOP of forward and backward pass for one token.

    `ffn_fraction` is the FFN experts' share of all selections: measured, or phi for an estimate.
    """
    return _FORWARD_AND_BACKWARD * forward_flops_per_token(config, ffn_fraction)


def forward_flops_per_token(config: Config, ffn_fraction: float) -> float:
    """FLOP of the forward pass for one token; see `training_flops_per_token`."""
    model, moe = config.model, config.moe
    layers, moe_layers = len(config.router_pattern), sum(config.router_pattern)
    # Multi-token prediction has a projection in each of its layers, and the output layer again.
    mtp_layer = 2 * model.hidden_size * (2 * model.hidden_size + model.vocab_size)
    experts_taken = moe.router_topk * ffn_fraction
    per_moe_layer = (
        experts_taken * _swiglu(config, config.expert_ffn_hidden_size)
        + _swiglu(config, moe.shared_expert_ffn_hidden_size or 0)
        + 2 * model.hidden_size * moe.shared_expert_gate
        + moe.local_flops(model.hidden_size)
    )
    routers = sum(
        2 * moe.router_parameters(model.hidden_size, is_first=layer == 0)
        for layer in range(moe_layers)
    )
    return (
        layers * _attention(config)
        + (layers - moe_layers) * _swiglu(config, model.ffn_hidden_size)
        + moe_layers * per_moe_layer
        + routers
        + 2 * model.hidden_size * model.vocab_size
        + model.mtp_num_layers * mtp_layer
    )


def _attention(config: Config) -> float:
    """FLOP of one layer's projections, scores [s, s] and their product with the values."""
    model, latent = config.model, config.model.latent_attention
    if latent is not None:
        matrices = sum(rows * columns for rows, columns in latent_matrices(model))
        scores = model.seq_length * model.num_attention_heads
        return 2 * matrices + 2 * scores * (latent.qk_dim + latent.v_head_dim)
    heads, groups = model.num_attention_heads, model.query_groups
    projections = 2 * model.hidden_size * model.head_dim * (2 * heads + 2 * groups)
    return projections + 4 * model.seq_length * heads * model.head_dim


def _swiglu(config: Config, inner: int) -> float:
    return FFN.flops(config.model.hidden_size, inner)
