"""Rules of the model's shape."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rules.divisibility import must_divide
from moepp_megatron.config.schema import Config


def _heads_divide_hidden_size(config: Config) -> Iterator[Problem]:
    """Heads without a width of their own share the hidden size evenly."""
    model = config.model
    heads = model.num_attention_heads
    if model.latent_attention is not None:
        return
    if model.kv_channels is None and model.hidden_size % heads:
        (problem,) = must_divide(
            "model.hidden_size",
            model.hidden_size,
            heads,
            f"model.num_attention_heads ({heads}) unless model.kv_channels is set",
        )
        yield problem


def _head_dim_is_even(config: Config) -> Iterator[Problem]:
    """Rotary embeddings turn channels in pairs."""
    model = config.model
    if model.latent_attention is not None:
        return
    if model.kv_channels is None:
        if model.hidden_size % model.num_attention_heads == 0 and model.head_dim % 2:
            yield Problem(
                "model.hidden_size",
                model.hidden_size,
                f"must give heads of even width for rotary embeddings, and "
                f"hidden_size / num_attention_heads is {model.head_dim}",
                f"use {(model.head_dim + 1) * model.num_attention_heads} "
                "or set model.kv_channels to an even number",
            )
    elif model.kv_channels % 2:
        yield Problem(
            "model.kv_channels",
            model.kv_channels,
            "must be even, because rotary embeddings turn channels in pairs",
            f"use {model.kv_channels + 1}",
        )


def _query_groups_divide_heads(config: Config) -> Iterator[Problem]:
    """Every key/value head serves the same number of query heads."""
    heads, groups = config.model.num_attention_heads, config.model.query_groups
    if heads % groups:
        fitting = [count for count in range(1, heads + 1) if heads % count == 0]
        yield Problem(
            "model.num_query_groups",
            groups,
            f"must divide model.num_attention_heads ({heads})",
            f"use one of {', '.join(map(str, fitting))}",
        )


def _qk_norms_are_there_to_span_heads(config: Config) -> Iterator[Problem]:
    """The scope applies to the norms of queries and keys, which must be on."""
    model = config.model
    if model.qk_layernorm_scope == "all_heads" and not model.qk_layernorm:
        yield Problem(
            "model.qk_layernorm_scope",
            model.qk_layernorm_scope,
            "must be 'head' without model.qk_layernorm, which has the norms that it describes",
            "use 'head', or set model.qk_layernorm to true",
        )


RULES = (
    _heads_divide_hidden_size,
    _head_dim_is_even,
    _query_groups_divide_heads,
    _qk_norms_are_there_to_span_heads,
)
