"""MoE++ (arXiv 2410.07348) trained inside NVIDIA megatron-core.

What a Python program calls is exported here and imported on first use, because importing
megatron-core takes seconds. `prepare`, `train`, `generate`, `score`, `convert`, `plan` and `report`
do what their commands do; where a command would end with one line and exit status 2 or 3, they
raise `ConfigError` or `UnfitError` with that line. `MoEPPConfig`, `get_moepp_layer_spec` and
`get_moepp_block_spec` are what another Megatron loop needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moepp_megatron.runtime.optional import missing
from moepp_megatron.version import __version__

if TYPE_CHECKING:
    from moepp_megatron.config import ConfigError, UnfitError
    from moepp_megatron.data.prepare import PrepareSettings, prepare
    from moepp_megatron.features.callbacks.part import Callback
    from moepp_megatron.interop.convert import convert
    from moepp_megatron.interop.generate import generate
    from moepp_megatron.interop.score import score
    from moepp_megatron.moe.config import MoEPPConfig
    from moepp_megatron.moe.spec import get_moepp_block_spec, get_moepp_layer_spec
    from moepp_megatron.tools.planning.plan import plan
    from moepp_megatron.tools.report.page import build_report as report
    from moepp_megatron.training.run import train

__all__ = [
    "__version__",
    "Callback",
    "ConfigError",
    "MoEPPConfig",
    "PrepareSettings",
    "UnfitError",
    "convert",
    "generate",
    "get_moepp_block_spec",
    "get_moepp_layer_spec",
    "plan",
    "prepare",
    "report",
    "score",
    "train",
]

_HOMES = {
    "Callback": "features.callbacks.part.Callback",
    "ConfigError": "config.ConfigError",
    "MoEPPConfig": "moe.config.MoEPPConfig",
    "PrepareSettings": "data.prepare.PrepareSettings",
    "UnfitError": "config.UnfitError",
    "convert": "interop.convert.convert",
    "generate": "interop.generate.generate",
    "get_moepp_block_spec": "moe.spec.get_moepp_block_spec",
    "get_moepp_layer_spec": "moe.spec.get_moepp_layer_spec",
    "plan": "tools.planning.plan.plan",
    "prepare": "data.prepare.prepare",
    "report": "tools.report.page.build_report",
    "score": "interop.score.score",
    "train": "training.run.train",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, _, own_name = _HOMES[name].rpartition(".")
        try:
            return getattr(importlib.import_module(f"{__name__}.{module}"), own_name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(missing(error), name=error.name) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
