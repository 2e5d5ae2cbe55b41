"""Exchanges modules in the spec of a layer."""

import dataclasses
from collections.abc import Callable

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

# From the model's configuration, megatron-core's spec of a layer, and whether the layer has
# experts, the spec with other modules around the experts.
LayerAdapter = Callable[[TransformerConfig, ModuleSpec, bool], ModuleSpec]


def with_submodules(spec: ModuleSpec, **changes: object) -> ModuleSpec:
    """The spec with other submodules."""
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, **changes))


def with_attention(layer: ModuleSpec, **changes: object) -> ModuleSpec:
    """The layer spec with other submodules of its self-attention."""
    attention = with_submodules(layer.submodules.self_attention, **changes)
    return with_submodules(layer, self_attention=attention)
