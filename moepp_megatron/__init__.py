"""MoE++ (arXiv 2410.07348) trained inside NVIDIA megatron-core.

What another Megatron loop needs is exported here and imported on first use, because importing
megatron-core takes seconds: `MoEPPConfig`, `get_moepp_layer_spec`, `get_moepp_block_spec`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moepp_megatron.moe.config import MoEPPConfig
    from moepp_megatron.moe.spec import get_moepp_block_spec, get_moepp_layer_spec

__version__ = "0.1.0"
__all__ = ["MoEPPConfig", "get_moepp_block_spec", "get_moepp_layer_spec"]

_HOMES = {
    "MoEPPConfig": "moepp_megatron.moe.config",
    "get_moepp_block_spec": "moepp_megatron.moe.spec",
    "get_moepp_layer_spec": "moepp_megatron.moe.spec",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
