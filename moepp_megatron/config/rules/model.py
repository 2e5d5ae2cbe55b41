"""Rules of the model's shape."""

from __future__ import annotations

from moepp_megatron.config.rows import Rule, first, group, refuse
from moepp_megatron.config.rules.divisibility import divisible
from moepp_megatron.config.schema import Config


def _fitting_groups(config: Config) -> str:
    heads = config.model.num_attention_heads
    fitting = [str(count) for count in range(1, heads + 1) if heads % count == 0]
    return f"use one of {', '.join(fitting)}"


def _wider_heads(config: Config) -> str:
    model = config.model
    width = (model.head_dim + 1) * model.num_attention_heads
    return f"use {width} or set model.kv_channels to an even number"


RULES: tuple[Rule, ...] = (
    group(
        lambda c: c.model.latent_attention is None and c.model.kv_channels is None,
        first(
            divisible(
                "model.hidden_size",
                lambda c: c.model.num_attention_heads,
                "model.num_attention_heads ({model.num_attention_heads}) unless "
                "model.kv_channels is set",
            ),
            refuse(
                "model.hidden_size",
                lambda c: c.model.head_dim % 2,
                "must give heads of even width for rotary embeddings, and hidden_size / "
                "num_attention_heads is {model.head_dim}",
                _wider_heads,
            ),
        ),
    ),
    group(
        lambda c: c.model.latent_attention is None and c.model.kv_channels is not None,
        refuse(
            "model.kv_channels",
            lambda c: c.model.head_dim % 2,
            "must be even, because rotary embeddings turn channels in pairs",
            lambda c: f"use {c.model.head_dim + 1}",
        ),
    ),
    refuse(
        "model.num_query_groups",
        lambda c: c.model.num_attention_heads % c.model.query_groups,
        "must divide model.num_attention_heads ({model.num_attention_heads})",
        _fitting_groups,
    ),
    refuse(
        "model.qk_layernorm_scope",
        lambda c: c.model.qk_layernorm_scope == "all_heads" and not c.model.qk_layernorm,
        "must be 'head' without model.qk_layernorm, which has the norms that it describes",
        "use 'head', or set model.qk_layernorm to true",
    ),
)
