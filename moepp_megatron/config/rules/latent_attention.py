"""Rules of `model.latent_attention`: settings that it replaces or excludes."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem, show
from moepp_megatron.config.schema import Config

NAME = "model.latent_attention"


def _latent_heads_have_their_own_widths(config: Config) -> Iterator[Problem]:
    """Every head has keys and values of its own, of the widths that the section gives."""
    model = config.model
    if model.latent_attention is None:
        return
    for key in ("num_query_groups", "kv_channels"):
        value = getattr(model, key)
        if value is not None:
            yield Problem(
                f"model.{key}",
                value,
                f"must be null with {NAME}, which gives every head keys and values of its own "
                "width",
                f"leave model.{key} out, or set {NAME} to null",
            )


def _latent_rotary_width_is_even(config: Config) -> Iterator[Problem]:
    """Rotary embeddings turn channels in pairs."""
    latent = config.model.latent_attention
    if latent is not None and latent.qk_pos_emb_head_dim % 2:
        yield Problem(
            f"{NAME}.qk_pos_emb_head_dim",
            latent.qk_pos_emb_head_dim,
            "must be even, because rotary embeddings turn channels in pairs",
            f"use {latent.qk_pos_emb_head_dim + 1}",
        )


def _latent_norms_have_vectors(config: Config) -> Iterator[Problem]:
    """megatron-core normalises both compressed vectors or neither (`QKNormConfigResolver`)."""
    model = config.model
    latent = model.latent_attention
    if latent is not None and model.qk_layernorm and latent.q_lora_rank is None:
        yield Problem(
            "model.qk_layernorm",
            True,
            f"must be false with {NAME}.q_lora_rank null: megatron-core normalises the compressed "
            "queries and keys together, and would normalise the layer's input twice instead",
            f"use false, or give {NAME}.q_lora_rank",
        )


def _latent_yarn_is_stretched(config: Config) -> Iterator[Problem]:
    """YaRN slows down channels between two numbers of rotations."""
    latent = config.model.latent_attention
    if latent is not None and latent.rope_type == "yarn" and latent.beta_slow >= latent.beta_fast:
        yield Problem(
            f"{NAME}.beta_slow",
            latent.beta_slow,
            f"must be less than {NAME}.beta_fast ({show(latent.beta_fast)})",
            "use 1.0 and 32.0",
        )


def _latent_attention_stands_where_it_was_tested(config: Config) -> Iterator[Problem]:
    """Parts that do not support latent attention, or were never run with it, are refused."""
    model = config.model
    if model.latent_attention is None:
        return
    conflicts: tuple[tuple[str, object, object, str], ...] = (
        ("model.qkv_bias", model.qkv_bias, False, "its projections have no biases"),
        (
            "model.qk_layernorm_scope",
            model.qk_layernorm_scope,
            "head",
            "its norms are of compressed vectors, which have no heads",
        ),
        (
            "precision.fp8_param",
            config.precision.fp8_param,
            False,
            "its projections have not been tested with weights in FP8",
        ),
    )
    for name, value, needed, reason in conflicts:
        if value != needed:
            yield Problem(
                name,
                value,
                f"must be {show(needed)} with {NAME}: {reason}",
                f"use {show(needed)}, or set {NAME} to null",
            )


def _repeated_expansion_is_in_high_precision(config: Config) -> Iterator[Problem]:
    """Transformer Engine's checkpoint would have to enter FP8 again for the expansion alone."""
    training = config.training
    if config.model.latent_attention is None or config.precision.fp8 is None:
        return
    if "mla_up_proj" in training.recompute_modules:
        yield Problem(
            "training.recompute_modules",
            training.recompute_modules,
            f"must not hold mla_up_proj with precision.fp8 ({config.precision.fp8}): its "
            "repetition has not been tested in FP8",
            "leave mla_up_proj out, or set precision.fp8 to null",
        )


def _up_projection_is_there_to_recompute(config: Config) -> Iterator[Problem]:
    """Only latent attention expands compressed vectors."""
    training = config.training
    if config.model.latent_attention is not None or training.recompute_granularity != "selective":
        return
    if "mla_up_proj" in training.recompute_modules:
        yield Problem(
            "training.recompute_modules",
            training.recompute_modules,
            f"must not hold mla_up_proj without {NAME}",
            f"leave mla_up_proj out, or give {NAME}",
        )


RULES = (
    _latent_heads_have_their_own_widths,
    _latent_rotary_width_is_even,
    _latent_norms_have_vectors,
    _latent_yarn_is_stretched,
    _latent_attention_stands_where_it_was_tested,
    _repeated_expansion_is_in_high_precision,
    _up_projection_is_there_to_recompute,
)
