"""All conversions, each under its name in `moepp convert`."""

import importlib
import logging
from pathlib import Path
from typing import Any

from moepp_megatron.config import ConfigError
from moepp_megatron.config.choices import pick
from moepp_megatron.runtime.optional import quiet

# Module of this room and function in it: each imports torch.
_CONVERTERS = {
    "hf-to-mcore": "to_mcore.hf_to_mcore",
    "mcore-to-hf": "to_hf.mcore_to_hf",
    "upcycle": "upcycle.upcycle",
    "megatron-lm": "from_megatron_lm.from_megatron_lm",
    "to-megatron-lm": "to_megatron_lm.to_megatron_lm",
}


def convert(kind: str, source: str | Path, target: str | Path, **options: Any) -> Path:
    """Convert a checkpoint, as `moepp convert` does, and log what a converter warns of.

    `kind` is one of `_CONVERTERS`, which get `options`. `source` is a checkpoint folder, or a run
    of ours; `target` is made, and must not exist or be empty.

    Raises:
        ConfigError: No such kind, a model that the other format cannot express, a damaged
            checkpoint, or a folder that is not free.
        UnfitError: `target` cannot be written.
    """
    module, name = pick(_CONVERTERS, "kind", kind).split(".")
    # At once: the converters import torch.
    free_folder(Path(target))
    quiet()
    converter = getattr(importlib.import_module(f"moepp_megatron.interop.{module}"), name)
    warnings = converter(Path(source), Path(target), **options)
    if isinstance(warnings, list):
        for warning in warnings:
            logging.getLogger(__name__).warning("%s", warning)
    return Path(target)


def free_folder(target: Path) -> Path:
    """The absolute path of a folder that may be written; ConfigError if something is there."""
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"DST ({target}) must not exist or be empty; choose another folder")
    return target
