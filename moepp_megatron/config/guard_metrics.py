"""The metrics that rules of the routing guard may use."""

from __future__ import annotations

# Of every MoE layer, in every step, from counts of what its router wants (not what the guard made
# of it).
COUNTED = {
    "ffn_fraction": "FFN experts' share of the selections",
    "ffn_to_target": "that share over the one that moe.budget or moe.tau wants",
    "ffn_per_token": "FFN experts a token takes",
    "max_ffn_load": "busiest FFN expert's selections over the FFN experts' mean",
    "min_ffn_load": "idlest FFN expert's selections over the FFN experts' mean",
    "max_expert_share": "largest share of any expert",
}
# Of every MoE layer, in steps where router health is measured (observe.health_interval).
MEASURED = {
    "gate_entropy": "entropy of the scores over the experts, nats",
    "gate_entropy_ratio": "that entropy over its largest value, log E",
    "selection_margin": "score of the last selected expert less that of the next",
    "logit_mean": "mean router logit",
    "logit_variance": "variance of the router logits",
    "own_logit_mean": "mean router logit without the residual",
    "own_logit_variance": "variance of the router logits without the residual",
    "residual_ratio": "norm of the residual's part of the logits over that of the layer's own",
    "row_cosine": "mean absolute cosine of two router rows",
    "row_cosine_max": "largest absolute cosine of two router rows",
    "balance_gradient_ratio": "balance loss's gradient at the logits over the model's",
    "constant_replaced": "share of the input that constant experts replace",
    "constant_norm": "norm of the constant experts' vectors",
}
# Of the whole model.
WHOLE = {
    "loss": "language-model loss, nats",
    "grad_norm": "gradient norm before clipping",
    "routing_shift": "divergence of the routing profile over its threshold; above 1 is a shift",
}
GUARD_METRICS = {**COUNTED, **MEASURED, **WHOLE}
