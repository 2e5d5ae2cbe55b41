"""ZEDA's format, both ways: Qwen3-MoE with zero-computation experts.

Source: the classes of github.com/TsinghuaC3I/ZEDA (arXiv 2605.18643). `zce_types` and `zce_nums`
extend the router by experts without an FFN, whose rows come behind those of the FFN experts. The
names of all other tensors are Qwen3-MoE's.
"""

from collections.abc import Iterator

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.errors import show
from moepp_megatron.experts import CONSTANT, COPY, LOCAL_KINDS, ZERO
from moepp_megatron.interop.expressible import PLAIN, Format, Row, refuse_settings, unknown_there
from moepp_megatron.interop.hf_config import assemble, plain_fields, require
from moepp_megatron.interop.tensor_rules import Fields, Rules, constant_rules, same
from moepp_megatron.interop.upcycle_sources import SourceKind

_KINDS = (CONSTANT, COPY, ZERO)
_BASE, _TYPE = "qwen3_moe", "qwen3_moe_plus_plus"
_SOURCE = SourceKind.of({"model_type": _BASE})
_RULES: tuple[Row, ...] = (
    *unknown_there(_KINDS),
    *PLAIN,
    ("moe.constants_shared", (False,), "each layer has its own constant experts"),
    ("model.qk_layernorm", (True,), "Qwen3 normalises queries and keys"),
    ("moe.shared_expert_ffn_hidden_size", (None,), "Qwen3-MoE has no shared expert"),
)


def _fields(config: Config) -> Fields:
    """ZEDA's `config.json`; ConfigError names each reason why the format cannot express it."""
    refuse_settings(config, _RULES, "--layout zeda", "use --layout moepp")
    moe = config.moe
    counts = {kind.name: moe.count(kind) for kind in _KINDS if moe.count(kind)}
    pattern = moe.moe_layer_pattern(config.model.num_layers)
    return plain_fields(config) | {
        "model_type": _TYPE,
        "architectures": ["Qwen3MoePlusPlusForCausalLM"],
        "attention_bias": False,
        "zce_types": list(counts),
        "zce_nums": list(counts.values()),
        # ZEDA's classes take it for true, and then no token selects one of these experts.
        "use_zce_mask": False,
        "num_experts": moe.num_ffn_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, is_moe in enumerate(pattern) if not is_moe],
    }


def is_zeda(hf: Fields) -> bool:
    """True for a ZEDA checkpoint: by its fields, as `model_type` may be the base model's."""
    return "zce_nums" in hf or hf.get("model_type") == _TYPE


def zeda_config(hf: Fields, name: str, dtype: str | None = None) -> Config:
    """Our configuration of one of ZEDA's models; ConfigError if it is another, or masked.

    `dtype` is fp32 or bf16 instead of the checkpoint's.
    """
    if hf.get("model_type") not in (_BASE, _TYPE):
        raise ConfigError(
            f"config.json: model_type ({hf.get('model_type')}) must be {_BASE} or {_TYPE} where "
            "there are zce_nums; ZEDA's other models cannot be converted"
        )
    counts = _counts(hf)
    assert _SOURCE.moe is not None, "Qwen3-MoE has experts"
    moe = _SOURCE.moe(hf) | counts | {"gating_residual": False}
    return assemble(_SOURCE.model(hf), moe, hf, name, dtype)


def _rules(config: Config) -> Rules:
    """Every tensor by the names of Qwen3-MoE; gates have rows for all experts."""

    def router(layer: int, ours: str, theirs: str) -> Rules:
        gate = f"{theirs}{_SOURCE.gate}.weight"
        yield same(ours + "router.weight", gate, config.moe.num_experts, config.model.hidden_size)
        yield from constant_rules(config, ours, ours, theirs + "mlp.experts.")

    return _SOURCE.rules(config, router)


def _warnings(config: Config) -> Iterator[str]:
    """Warnings about what readers of the format do otherwise."""
    kinds = [kind for kind in _KINDS if config.moe.count(kind)]
    if kinds not in ([], [COPY], [ZERO]):
        counts = ", ".join(f"moe.{kind.setting} ({config.moe.count(kind)})" for kind in kinds)
        yield (
            f"{counts}: ZEDA's class for transformers computes them, its server only models that "
            "have either copy or zero experts"
        )
    if not all(config.moe.moe_layer_pattern(config.model.num_layers)):
        yield (
            f"moe.layer_freq ({show(config.moe.layer_freq)}): ZEDA's server takes every layer of "
            "Qwen3 for a MoE layer"
        )


def _counts(hf: Fields) -> dict[str, int]:
    """Our numbers of zero-computation experts; ConfigError if they are masked or out of order."""
    types, numbers = require(hf, "zce_types"), require(hf, "zce_nums")
    known = [kind.name for kind in _KINDS]
    are_lists = isinstance(types, list) and isinstance(numbers, list)
    if not are_lists or types != [k for k in known if k in types] or len(types) != len(numbers):
        raise ConfigError(
            f"config.json: zce_types ({show(types)}) must be some of {', '.join(known)} in this "
            f"order, with one of zce_nums ({show(numbers)}) for each; such a checkpoint cannot be "
            "converted"
        )
    mask = hf.get("use_zce_mask", True)
    if mask is not False:
        raise ConfigError(
            f"config.json: use_zce_mask ({show(mask)}) must be false: with it, or without this "
            "field, no token selects a zero-computation expert; set it to false if the model was "
            "trained with them"
        )
    by_name = dict(zip(types, numbers, strict=True))
    return {kind.setting: by_name.get(kind.name, 0) for kind in LOCAL_KINDS}


ZEDA = Format(_fields, _rules, warnings=_warnings)
