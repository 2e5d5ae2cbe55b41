"""The vanilla model that a MoE++ configuration is compared with."""

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.load import parse_config
from moepp_megatron.config.schema import Config
from moepp_megatron.experts import FFN_ONLY
from moepp_megatron.layer_settings import EXTENSIONS


def vanilla(config: Config) -> Config:
    """The same model on megatron-core's own MoE layer.

    It has no zero-computation experts, no gating residual, no other setting of the MoE++ layer and
    no routing guard. megatron-core's balance loss is E / K times the paper's and has the scale of
    the grouped one; its coefficient is that of the same strength. Its global loss has yet another
    scale and is replaced by that of micro-batches.
    """
    content = config.model_dump(mode="json", exclude_unset=True)
    content.pop("routing_guard", None)
    moe = content["moe"]
    for name in ("budget", "bias_update_rate", "static_rows", *EXTENSIONS):
        moe.pop(name, None)
    own_scale = config.moe.router_topk / config.moe.num_ffn_experts
    scale = {"heterogeneous": own_scale, "grouped": 1.0}[config.moe.balance_loss]
    moe |= {**FFN_ONLY, "gating_residual": False, "balance_coeff": config.moe.balance_coeff * scale}
    if moe.get("balance_scope") == "global":
        moe["balance_scope"] = "microbatch"
    if moe.get("dispatcher") == "alltoall_dedup":
        moe["dispatcher"] = "alltoall"
    return parse_config(content)


def refuse_vanilla(config: Config) -> None:
    """Refuse (ConfigError) a vanilla model, which would be compared with itself."""
    if config.moe.is_vanilla:
        raise ConfigError(
            f"moe.num_zero_experts ({config.moe.num_zero_experts}) and the other counts of "
            "zero-computation experts must not all be 0 to be compared with vanilla; use 1"
        )
