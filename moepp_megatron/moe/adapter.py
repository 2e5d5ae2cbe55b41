"""Exchanges modules in the spec of a layer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig

# From the model's configuration, megatron-core's spec of a layer, and whether the layer has
# experts, the spec with other modules around the experts.
LayerAdapter = Callable[[TransformerConfig, ModuleSpec, bool], ModuleSpec]
# Keywords of version 0.1.0; Transformer Engine's modules ignored those for local modules.
_LOCAL, _DEPRECATED = ("norm", "core_attention"), ("norm", "core_attention", "qk_norms")


def with_submodules(spec: ModuleSpec, **changes: object) -> ModuleSpec:
    """The spec with other submodules."""
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, **changes))


def with_attention(layer: ModuleSpec, **changes: object) -> ModuleSpec:
    """The layer spec with other submodules of its self-attention."""
    attention = with_submodules(layer.submodules.self_attention, **changes)
    return with_submodules(layer, self_attention=attention)


def from_deprecated(
    adapt: LayerAdapter | None, keywords: dict[str, Any], use_transformer_engine: bool
) -> LayerAdapter | None:
    """`adapt`, or one of the deprecated keywords; TypeError for other keywords, or with both."""
    if not keywords:
        return adapt
    names = ", ".join(keywords)
    if not keywords.keys() <= set(_DEPRECATED):
        raise TypeError(f"unexpected keyword arguments among {names}; use adapt")
    if adapt is not None:
        raise TypeError(f"{names} must not be given with adapt, which replaced them; use adapt")
    warnings.warn(
        f"{names}: deprecated, removed in version 0.3; use adapt, such as "
        "moepp_megatron.model.local_modules.fit_local_modules",
        DeprecationWarning,
        stacklevel=3,
    )
    ignored = _LOCAL if use_transformer_engine else ()
    return partial(_exchange, **{k: v for k, v in keywords.items() if k not in ignored})


def _exchange(
    config: TransformerConfig,
    spec: ModuleSpec,
    is_moe: bool,
    norm: LayerNormBuilder | None = None,
    core_attention: Any = None,
    qk_norms: tuple[LayerNormBuilder, LayerNormBuilder] | None = None,
) -> ModuleSpec:
    if core_attention is not None:
        spec = with_attention(spec, core_attention=core_attention)
    if norm is not None:
        qk_norm = norm if config.qk_layernorm else IdentityOp
        keys = "kv_layernorm" if config.multi_latent_attention else "k_layernorm"
        spec = with_attention(spec, **{"q_layernorm": qk_norm, keys: qk_norm})
        spec = with_submodules(spec, input_layernorm=norm, pre_mlp_layernorm=norm)
    if qk_norms is not None:
        spec = with_attention(spec, q_layernorm=qk_norms[0], k_layernorm=qk_norms[1])
    return spec
