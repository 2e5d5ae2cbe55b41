"""FP8 shape rules: both dimensions of every GEMM must be aligned on each rank.

(Transformer Engine, `assert_dim_for_fp8_exec`.) They apply only where FP8 is on.
"""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rows import Rule, group
from moepp_megatron.config.rules.divisibility import must_divide
from moepp_megatron.config.schema import Config, LatentAttentionSection


def _alignment(config: Config) -> int:
    """Of what both sides are multiples (Transformer Engine 2.20, `quantization_alignment`)."""
    recipe = config.precision.recipe or "delayed"
    return {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}[recipe]


def _widths(config: Config) -> Iterator[Problem]:
    """Both sides of every weight shard."""
    model, moe, alignment = config.model, config.moe, _alignment(config)
    tp, etp = config.parallel.tensor_model_parallel_size, config.parallel.expert_tensor_size
    name = f"{'moe' if moe.ffn_hidden_size is not None else 'model'}.ffn_hidden_size"
    widths = {("model.hidden_size", model.hidden_size): alignment}
    widths[name, config.expert_ffn_hidden_size] = alignment * etp
    if moe.shared_expert_ffn_hidden_size is not None:
        key = ("moe.shared_expert_ffn_hidden_size", moe.shared_expert_ffn_hidden_size)
        widths[key] = alignment * tp
    # A step of 0 layers is refused by a rule of its own.
    if moe.layer_freq and not all(moe.moe_layer_pattern(model.num_layers)):
        key = ("model.ffn_hidden_size", model.ffn_hidden_size)
        widths[key] = max(alignment * tp, widths.get(key, 0))
    for (name, value), divisor in widths.items():
        yield from must_divide(name, value, divisor, f"{divisor} for FP8")


def _heads(config: Config) -> Iterator[Problem]:
    """The shards of the projections around attention."""
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    alignment = _alignment(config)
    if model.latent_attention is not None:
        yield from _latent_vectors(model.latent_attention, ranks, config)
        return
    heads, groups = model.num_attention_heads // ranks, max(model.query_groups // ranks, 1)
    for what, channels in (
        ("query", heads * model.head_dim),
        ("query, key and value", (heads + 2 * groups) * model.head_dim),
    ):
        if channels % alignment:
            yield Problem(
                "model.num_attention_heads",
                model.num_attention_heads,
                f"must give every rank a multiple of {alignment} {what} channels for FP8, "
                f"not {channels} (heads of {model.head_dim}, "
                f"parallel.tensor_model_parallel_size {ranks})",
                f"use heads of {alignment} channels or more (model.kv_channels), or fewer ranks",
            )
            return


def _latent_vectors(
    latent: LatentAttentionSection, ranks: int, config: Config
) -> Iterator[Problem]:
    """Compressed vectors are whole on every rank; what heads get from them is split."""
    heads, alignment = config.model.num_attention_heads // ranks, _alignment(config)
    kv_lora_rank, shared = latent.kv_lora_rank, latent.kv_lora_rank + latent.qk_pos_emb_head_dim
    for key, what, channels in (
        ("q_lora_rank", "compressed query", latent.q_lora_rank or 0),
        ("kv_lora_rank", "compressed key and value", kv_lora_rank),
        ("qk_pos_emb_head_dim", "compressed and shared key", shared),
        ("qk_head_dim", "query", heads * latent.qk_dim),
        ("v_head_dim", "value", heads * latent.v_head_dim),
        ("qk_head_dim", "key and value", heads * (latent.qk_head_dim + latent.v_head_dim)),
    ):
        if channels % alignment:
            yield Problem(
                f"model.latent_attention.{key}",
                getattr(latent, key),
                f"must give every rank a multiple of {alignment} {what} channels for FP8, "
                f"not {channels} (parallel.tensor_model_parallel_size {ranks})",
                f"use multiples of {alignment} for all widths of model.latent_attention",
            )
            return


def _tokens(config: Config) -> Iterator[Problem]:
    """The tokens of a rank's micro-batch are a side of its GEMMs."""
    # Experts pad their own rows, but the projections around attention and shared experts do not.
    parallel, training, alignment = config.parallel, config.training, _alignment(config)
    ranks = parallel.context_parallel_size
    if parallel.uses_sequence_parallel:
        ranks *= parallel.tensor_model_parallel_size
    tokens = config.model.seq_length // ranks * training.micro_batch_size
    if config.model.seq_length % ranks == 0 and tokens % alignment:
        yield Problem(
            "model.seq_length",
            config.model.seq_length,
            f"must give every rank a multiple of {alignment} tokens for FP8, not {tokens} "
            f"(training.micro_batch_size {training.micro_batch_size}, sequences split over "
            f"{ranks} ranks)",
            f"use a multiple of {alignment * ranks}",
        )


def _heads_divide(config: Config) -> bool:
    """True if no other rule already refuses the shapes of attention."""
    ranks = config.parallel.tensor_model_parallel_size
    return (
        config.model.hidden_size % _alignment(config)
        == config.model.num_attention_heads % ranks
        == 0
    )


RULES: tuple[Rule, ...] = (_widths, group(_heads_divide, _heads), _tokens)
