"""The kinds of models that can be upcycled, with the names of their tensors."""

from collections.abc import Callable
from dataclasses import dataclass

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.interop.hf_config import (
    MOEPP_TYPES,
    decoder_section,
    refuse_fields,
    require,
)
from moepp_megatron.interop.tensor_rules import (
    Fields,
    Rules,
    attention_rules,
    decoder_rules,
    dense_mlp_rules,
    row,
    same,
    shared_expert_rules,
    stacked,
    unused,
)

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# What DeepSeek's and transformers' code adds to mean squares in the norms of latent attention.
_LATENT_EPSILON = 1e-6
# Scores of a group that transformers' and DeepSeek's code add up to rank it.
_RANKED_PER_GROUP = 2


@dataclass(frozen=True)
class SourceKind:
    """One `model_type`.

    Attributes:
        moe: Fields of our `moe` section that `config.json` decides, or a ConfigError; None for a
            dense model.
        model: Our `model` section.
        gate: Name of the router in a layer; None for a dense model.
        bias: Name of its selection bias; None where there is none.
        experts: Name of FFN expert `{}` in a layer.
        projections: Names of its gate, up and down projection.
        shared: Name of the shared expert in a layer; None where there is none.
        attention: Rules of a layer's attention and norms.
    """

    moe: Callable[[Fields], Fields] | None
    model: Callable[[Fields], Fields]
    gate: str | None = "mlp.gate"
    bias: str | None = None
    experts: str = "mlp.experts.{}"
    projections: tuple[str, str, str] = _PROJECTIONS
    shared: str | None = None
    attention: Callable[[Config, int, bool], Rules] = lambda config, layer, is_moe: attention_rules(
        config, layer
    )

    @classmethod
    def of(cls, hf: Fields) -> "SourceKind":
        """The kind of a checkpoint; ConfigError if it is another, or its attention is not full."""
        name = hf.get("model_type")
        # ZEDA's recipe leaves the type of the model that it began with.
        if name in MOEPP_TYPES or "zce_nums" in hf:
            raise ConfigError(
                f"config.json: model_type ({name}) must be that of a model without "
                "zero-computation experts, and this is a MoE++ model already; use moepp convert "
                "hf-to-mcore"
            )
        if name not in _KINDS:
            raise ConfigError(
                f"config.json: model_type ({name}) must be one of {', '.join(_KINDS)}; other "
                "models cannot be upcycled"
            )
        layers = set(hf.get("layer_types") or ["full_attention"])
        if layers != {"full_attention"}:
            raise ConfigError(
                f"config.json: layer_types ({', '.join(sorted(layers))}) must all be "
                "full_attention; such a checkpoint cannot be converted"
            )
        return _KINDS[name]

    def rules(self, config: Config, router: Callable[[int, str, str], Rules]) -> Rules:
        """Every tensor by these names; `router`: by layer and the beginnings of names."""
        yield from decoder_rules(config)
        for layer, is_moe in enumerate(config.moe.moe_layer_pattern(config.model.num_layers)):
            yield from self.attention(config, layer, is_moe)
            if not is_moe:
                yield from dense_mlp_rules(config, layer)
                continue
            ours, theirs = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}."
            yield from self._experts(config, ours + "experts.experts.", theirs)
            yield from shared_expert_rules(config, ours, f"{theirs}{self.shared}")
            yield from router(layer, ours, theirs)

    def _experts(self, config: Config, ours: str, theirs: str) -> Rules:
        """The FFN experts of a layer; the one FFN of a dense model is copied into each."""
        width, inner = config.model.hidden_size, config.expert_ffn_hidden_size
        count = config.moe.num_ffn_experts
        for index in range(count):
            *both, down = self._weights(theirs, index)
            yield stacked(ours + "linear_fc1.weight", both, inner, width, (count, index))
            yield row(ours + "linear_fc2.weight", count, index, down, width, inner)

    def zero_experts(self, config: Config, theirs: str, indices: range) -> Rules:
        """FFN experts `indices` of a layer, of zeros: what zero experts compute."""
        width, inner = config.model.hidden_size, config.expert_ffn_hidden_size
        for index in indices:
            gate, up, down = self._weights(theirs, index)
            yield unused(gate, inner, width)
            yield unused(up, inner, width)
            yield unused(down, width, inner)

    def _weights(self, theirs: str, index: int) -> list[str]:
        prefix = theirs + self.experts.format(index)
        return [f"{prefix}.{name}.weight" for name in self.projections]


def _mixtral_moe(hf: Fields) -> Fields:
    count = hf.get("num_local_experts") or require(hf, "num_experts")
    return {"num_ffn_experts": count, "router_topk": require(hf, "num_experts_per_tok")}


def _softmax_moe(hf: Fields) -> Fields:
    is_normalised = hf.get("norm_topk_prob", False)
    return {"gate_normalization": "selected" if is_normalised else "none", **_mixtral_moe(hf)}


def _qwen3_moe(hf: Fields) -> Fields:
    return {
        **_softmax_moe(hf),
        "ffn_hidden_size": require(hf, "moe_intermediate_size"),
        "layer_freq": _qwen_pattern(hf),
    }


def _qwen2_moe(hf: Fields) -> Fields:
    return {
        **_qwen3_moe(hf),
        "shared_expert_ffn_hidden_size": require(hf, "shared_expert_intermediate_size"),
        "shared_expert_gate": True,
    }


def _qwen_pattern(hf: Fields) -> list[int]:
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    layers = range(require(hf, "num_hidden_layers"))
    return [int(layer not in dense and (layer + 1) % step == 0) for layer in layers]


def _qwen3_decoder(hf: Fields) -> Fields:
    return decoder_section({**hf, "qk_norm": True})


def _olmoe_decoder(hf: Fields) -> Fields:
    why = "this package's decoder does not clip queries, keys and values"
    refuse_fields([("clip_qkv", hf.get("clip_qkv"), None, why)], "upcycled")
    # Its own default of the epsilon; norms of queries and keys are always there.
    fields = {"rms_norm_eps": 1e-5, **hf, "qk_norm": True, "qk_norm_scope": "all_heads"}
    return decoder_section(fields)


def _deepseek_decoder_section(hf: Fields) -> Fields:
    """Return a DeepSeek-V3's `model` section; ConfigError if the decoder here lacks a feature."""
    norms = "all norms of this package's decoder add the same, and those of latent attention 1e-6"
    epsilon, paired = hf.get("rms_norm_eps", _LATENT_EPSILON), hf.get("rope_interleave", True)
    quantized = hf.get("quantization_config")
    rows = (
        ("quantization_config", quantized, None, "convert the weights to bf16 first"),
        ("rope_interleave", paired, True, "pairs of channels are rotated"),
        ("rms_norm_eps", epsilon, _LATENT_EPSILON, norms),
    )
    refuse_fields(rows)
    plain = {key: hf[key] for key in hf if key not in ("kv_lora_rank", "head_dim", "rope_scaling")}
    rope = (hf.get("rope_parameters") or {}) | {"rope_type": "default"}
    plain |= {"rope_parameters": rope, "qk_norm": True}
    section = decoder_section(plain)
    del section["num_query_groups"]
    latent = {
        "q_lora_rank": hf.get("q_lora_rank"),
        "kv_lora_rank": require(hf, "kv_lora_rank"),
        "qk_head_dim": require(hf, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": require(hf, "qk_rope_head_dim"),
        "v_head_dim": require(hf, "v_head_dim"),
    }
    if latent["q_lora_rank"] is None:
        raise ConfigError(
            "config.json: q_lora_rank (null) must be a width: without compressed queries "
            "megatron-core normalises no compressed keys either; such a checkpoint cannot be "
            "converted"
        )
    return section | {"latent_attention": latent | _rotation(hf)}


def _rotation(hf: Fields) -> Fields:
    """The rotary embedding, from transformers 5's field or the older one."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {"rope_type": "rope"}
    if kind != "yarn":
        raise ConfigError(
            f"config.json: rope_type ({kind}) must be default or yarn; such a checkpoint cannot be "
            "converted"
        )
    # Those that are absent have the same default here.
    given = [key for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim") if rope.get(key)]
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(require(rope, "factor")),
        "original_max_position_embeddings": require(rope, "original_max_position_embeddings"),
        **{key: float(rope[key]) for key in given},
    }


def _deepseek_moe(hf: Fields) -> Fields:
    """Fields of our `moe` section of a DeepSeek-V3 model; ConfigError for other routing."""
    groups, kept = hf.get("n_group") or 1, hf.get("topk_group") or 1
    topk = require(hf, "num_experts_per_tok")
    if kept < groups and topk // kept != _RANKED_PER_GROUP:
        raise ConfigError(
            f"config.json: topk_group ({kept}) must be such that num_experts_per_tok ({topk}) "
            f"divided by it and rounded down is {_RANKED_PER_GROUP}: DeepSeek-V3's code adds up "
            "that many scores of a group whatever the numbers, this package's as many as the "
            "paper says; such a checkpoint cannot be upcycled exactly"
        )
    rows = (
        ("scoring_func", hf.get("scoring_func", "sigmoid"), "sigmoid", "DeepSeek-V3's scores"),
        ("norm_topk_prob", hf.get("norm_topk_prob", True), True, "gates are shares of their sum"),
        ("moe_layer_freq", hf.get("moe_layer_freq", 1), 1, "every layer behind the dense ones"),
    )
    refuse_fields(rows, "upcycled exactly")
    width, shared = require(hf, "moe_intermediate_size"), hf.get("n_shared_experts") or 0
    dense, layers = hf.get("first_k_dense_replace") or 0, require(hf, "num_hidden_layers")
    return {
        "num_ffn_experts": require(hf, "n_routed_experts"),
        "router_topk": topk,
        "num_groups": groups if kept < groups else 1,
        "group_topk": kept if kept < groups else 1,
        "score_function": "sigmoid",
        "gate_scale": float(hf.get("routed_scaling_factor", 1.0)),
        "ffn_hidden_size": width,
        "shared_expert_ffn_hidden_size": shared * width or None,
        "layer_freq": [int(layer >= dense) for layer in range(layers)],
    }


def _deepseek_attention(config: Config, layer: int, is_moe: bool) -> Rules:
    """Attention and both norms of a layer with multi-head latent attention."""
    model, latent = config.model, config.model.latent_attention
    assert latent is not None, "the model has another attention"
    assert latent.q_lora_rank is not None, "queries that are not compressed were refused"
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    # As in `moepp_megatron.model.local_modules`.
    ffn_norm = "pre_mlp_layernorm.weight" if is_moe else "mlp.linear_fc1.layer_norm_weight"
    width, heads = model.hidden_size, model.num_attention_heads
    yield same(ours + "input_layernorm.weight", theirs + "input_layernorm.weight", width)
    yield same(ours + ffn_norm, theirs + "post_attention_layernorm.weight", width)
    queries, keys = latent.q_lora_rank, latent.kv_lora_rank
    expanded = heads * (latent.qk_head_dim + latent.v_head_dim)
    for own, other, *shape in (
        ("q_down_proj.", "q_a_proj", queries, width),
        ("q_up_proj.layer_norm_", "q_a_layernorm", queries),
        ("q_up_proj.", "q_b_proj", heads * latent.qk_dim, queries),
        ("kv_down_proj.", "kv_a_proj_with_mqa", keys + latent.qk_pos_emb_head_dim, width),
        ("kv_up_proj.layer_norm_", "kv_a_layernorm", keys),
        ("kv_up_proj.", "kv_b_proj", expanded, keys),
        ("proj.", "o_proj", width, heads * latent.v_head_dim),
    ):
        key = f"{ours}self_attention.linear_{own}weight"
        yield same(key, f"{theirs}self_attn.{other}.weight", *shape)


def _dense(model: Callable[[Fields], Fields]) -> SourceKind:
    return SourceKind(None, model, gate=None, experts="mlp")


_KINDS = {
    "llama": _dense(decoder_section),
    "qwen3": _dense(_qwen3_decoder),
    "mixtral": SourceKind(
        _mixtral_moe,
        decoder_section,
        gate="block_sparse_moe.gate",
        experts="block_sparse_moe.experts.{}",
        projections=("w1", "w3", "w2"),
    ),
    "olmoe": SourceKind(_softmax_moe, _olmoe_decoder),
    "qwen3_moe": SourceKind(_qwen3_moe, _qwen3_decoder),
    "qwen2_moe": SourceKind(
        _qwen2_moe,
        lambda hf: decoder_section({"qkv_bias": True, **hf}),
        shared="mlp.shared_expert",
    ),
    "deepseek_v3": SourceKind(
        _deepseek_moe,
        _deepseek_decoder_section,
        bias="mlp.gate.e_score_correction_bias",
        shared="mlp.shared_experts",
        attention=_deepseek_attention,
    ),
}
