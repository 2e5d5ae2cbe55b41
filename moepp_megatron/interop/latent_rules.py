"""Tensors of multi-head latent attention by the names that DeepSeek-V3's descendants share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from moepp_megatron.config import Config
from moepp_megatron.interop.tensor_rules import HFTensor, TensorRule, same

# What transformers adds to mean squares in the norms of latent attention, whatever the model has.
LATENT_EPSILON = 1e-6


def latent_fields(config: Config) -> dict[str, Any]:
    """Fields of a `config.json` about latent attention."""
    latent = config.model.latent_attention
    assert latent is not None, "the model has another attention"
    return {
        "num_key_value_heads": config.model.num_attention_heads,
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_head_dim,
        "qk_rope_head_dim": latent.qk_pos_emb_head_dim,
        "v_head_dim": latent.v_head_dim,
    }


def epsilon_warnings(config: Config) -> Iterator[str]:
    """A warning where transformers computes an export's norms of latent attention otherwise."""
    epsilon = config.model.norm_epsilon
    if config.model.latent_attention is not None and epsilon != LATENT_EPSILON:
        yield (
            f"model.norm_epsilon ({epsilon:g}) is not {LATENT_EPSILON:g}, which transformers adds "
            "in the norms of latent attention whatever the model has"
        )


def latent_attention_rules(
    config: Config, layer: int, theirs: str, q_scale: float = 1.0, kv_scale: float = 1.0
) -> Iterator[TensorRule]:
    """Attention of a layer, without the norms before and behind it.

    `theirs` begins the other format's names (`model.layers.0.self_attn.`). `q_scale` and `kv_scale`
    are its factors on the compressed query, and on the compressed key and value, after their norms.
    """
    model, latent = config.model, config.model.latent_attention
    assert latent is not None, "the model has another attention"
    ours = f"decoder.layers.{layer}.self_attention."
    width, heads = model.hidden_size, model.num_attention_heads
    if latent.q_lora_rank is None:
        yield same(
            ours + "linear_q_proj.weight", theirs + "q_proj.weight", heads * latent.qk_dim, width
        )
    else:
        rank = latent.q_lora_rank
        yield same(ours + "linear_q_down_proj.weight", theirs + "q_a_proj.weight", rank, width)
        norm = ours + "linear_q_up_proj.layer_norm_weight"
        yield _scaled(norm, theirs + "q_a_layernorm.weight", q_scale, rank)
        up = theirs + "q_b_proj.weight"
        yield same(ours + "linear_q_up_proj.weight", up, heads * latent.qk_dim, rank)
    rank = latent.kv_lora_rank
    down = theirs + "kv_a_proj_with_mqa.weight"
    rows = rank + latent.qk_pos_emb_head_dim
    yield same(ours + "linear_kv_down_proj.weight", down, rows, width)
    norm = ours + "linear_kv_up_proj.layer_norm_weight"
    yield _scaled(norm, theirs + "kv_a_layernorm.weight", kv_scale, rank)
    rows = heads * (latent.qk_head_dim + latent.v_head_dim)
    yield same(ours + "linear_kv_up_proj.weight", theirs + "kv_b_proj.weight", rows, rank)
    columns = heads * latent.v_head_dim
    yield same(ours + "linear_proj.weight", theirs + "o_proj.weight", width, columns)


def norm_keys(layer: int, is_moe: bool) -> tuple[str, str]:
    """Our names of the weights of the norms before attention and before the FFN."""
    ours = f"decoder.layers.{layer}."
    # As in `moepp_megatron.model.latent_attention`.
    ffn_norm = "pre_mlp_layernorm.weight" if is_moe else "mlp.linear_fc1.layer_norm_weight"
    return ours + "input_layernorm.weight", ours + ffn_norm


def _scaled(key: str, name: str, scale: float, *shape: int) -> TensorRule:
    """A tensor that is `scale` times smaller in the other format."""
    if scale == 1.0:
        return same(key, name, *shape)

    def pack(tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0] * scale

    return TensorRule(key, shape, (HFTensor(name, shape),), None, pack, lambda t: [t / scale])
