"""Exports models with zero experts as a vanilla MoE that llama.cpp has.

Gates that are raw softmax scores make it DeepSeek-MoE (the first, with plain attention), gates that
are divided by their sum Mixtral, or Qwen3-MoE if queries and keys have norms. Zero experts become
FFN experts of zeros. Refused is all that llama.cpp's converter and graphs do not read.

Not Qwen2-MoE: llama.cpp takes x sigmoid(x) / x for its shared expert's gate, no number at x = 0.
"""

from collections.abc import Iterator
from dataclasses import replace

from moepp_megatron.config import Config
from moepp_megatron.experts import ZERO
from moepp_megatron.interop.expressible import PLAIN, Format, Row, refuse_settings, unknown_there
from moepp_megatron.interop.hf_config import plain_fields
from moepp_megatron.interop.tensor_rules import Fields, Rules, same
from moepp_megatron.interop.upcycle_sources import SourceKind

# model_type, class, name of the number of experts.
_Kind = tuple[str, str, str]
_DEEPSEEK: _Kind = ("deepseek", "DeepseekForCausalLM", "n_routed_experts")
_MIXTRAL: _Kind = ("mixtral", "MixtralForCausalLM", "num_local_experts")
_QWEN3: _Kind = ("qwen3_moe", "Qwen3MoeForCausalLM", "num_experts")
# By `gate_normalization`, without and with norms of queries and keys; `nonzero` is refused.
_KINDS = {
    "none": (_DEEPSEEK, _DEEPSEEK),
    "selected": (_MIXTRAL, _QWEN3),
    "nonzero": (_MIXTRAL, _QWEN3),
}
_SHARED = "mlp.shared_experts"


def _fields(config: Config) -> Fields:
    """`config.json` of a vanilla MoE; ConfigError names each reason why none can express it."""
    remedy = "use --layout moepp (docs/how_to/llama_cpp.md: what it would take)"
    rows = (*unknown_there((ZERO,)), *PLAIN, *_own_rules(config))
    refuse_settings(config, rows, "--layout vanilla", remedy)
    moe, inner = config.moe, config.expert_ffn_hidden_size
    model_type, architecture, experts = kind = _kind(config)
    shared = (moe.shared_expert_ffn_hidden_size or inner) // inner
    return {
        **plain_fields(config),
        "model_type": model_type,
        "architectures": [architecture],
        experts: moe.num_experts,
        "intermediate_size": inner,
        **({"n_shared_experts": shared, "first_k_dense_replace": 0} if kind is _DEEPSEEK else {}),
    }


def _rules(config: Config) -> Rules:
    """Every tensor by the names of DeepSeek-MoE, Mixtral or Qwen3-MoE."""
    moe, width = config.moe, config.model.hidden_size
    source = SourceKind.of({"model_type": "mixtral" if _kind(config) is _MIXTRAL else "qwen3_moe"})
    source = replace(source, shared=_SHARED)

    def router(layer: int, ours: str, theirs: str) -> Rules:
        yield same(ours + "router.weight", f"{theirs}{source.gate}.weight", moe.num_experts, width)
        zeros = range(moe.num_ffn_experts, moe.num_experts)
        yield from source.zero_experts(config, theirs, zeros)
        if _lacks_shared(config):
            shared = replace(source, experts=_SHARED)
            yield from shared.zero_experts(config, theirs, range(1))

    return source.rules(config, router)


def _warnings(config: Config) -> Iterator[str]:
    """Warnings about costs of the format."""
    zeros = config.moe.num_zero_experts
    if zeros:
        yield (
            f"moe.num_zero_experts ({zeros}): zero experts became FFN experts of "
            "zeros, which cost what FFN experts cost"
        )
    if _lacks_shared(config):
        yield (
            "moe.shared_expert_ffn_hidden_size (null): llama.cpp's DeepSeek-MoE has a shared "
            "expert; it became one of zeros, which costs every token what an FFN expert costs"
        )


def _kind(config: Config) -> _Kind:
    return _KINDS[config.moe.gate_normalization][config.model.qk_layernorm]


def _lacks_shared(config: Config) -> bool:
    return _kind(config) is _DEEPSEEK and config.moe.shared_expert_ffn_hidden_size is None


def _own_rules(config: Config) -> Iterator[Row]:
    """Yield rows for the model's shape."""
    model, moe, inner = config.model, config.moe, config.expert_ffn_hidden_size
    has_dense = not all(moe.moe_layer_pattern(model.num_layers))
    yield "moe.layer_freq", (1 if has_dense else moe.layer_freq,), "there are no dense layers"
    if _kind(config) is not _DEEPSEEK:
        why = "only models with raw gates have shared experts there"
        yield "moe.shared_expert_ffn_hidden_size", (None,), why
        return
    width = model.hidden_size // model.num_attention_heads
    yield "model.qk_layernorm", (False,), "models with raw gates have no such norms there"
    yield "model.kv_channels", (None, width), "heads divide the hidden size there"
    whole = max((moe.shared_expert_ffn_hidden_size or 0) // inner, 1) * inner
    yield "moe.shared_expert_ffn_hidden_size", (None, whole), "shared experts are counted there"


VANILLA = Format(_fields, _rules, keeps_unused=True, warnings=_warnings)
