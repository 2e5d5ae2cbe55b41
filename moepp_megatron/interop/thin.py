"""The models of `moepp thin`: reads what becomes cheaper, and makes what training starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.file_names import CONFIG_FILE, MODEL_CONFIG_FILE
from moepp_megatron.interop.hf_config import MOEPP_TYPES
from moepp_megatron.interop.hf_source import read_json
from moepp_megatron.interop.model_card import TRAINING_CONFIG_FILE
from moepp_megatron.interop.to_hf import mcore_to_hf
from moepp_megatron.interop.to_mcore import hf_to_mcore, read_format
from moepp_megatron.interop.upcycle import Additions, upcycle, upcycled_config
from moepp_megatron.interop.upcycle_sources import source_kind
from moepp_megatron.interop.zeda import is_zeda
from moepp_megatron.training.thin_folder import ThinFolder

_NOTHING = Additions(
    num_zero_experts=0, num_copy_experts=0, num_constant_experts=0, gating_residual=False
)


class ThinModels(ThinFolder):
    """The models of a recipe, from any folder that has one."""

    @classmethod
    def read(cls, folder: Path, out: Path, recipe: str) -> ThinModels:
        """ConfigError: no folder, or no model that takes experts by choice."""
        if not folder.is_dir():
            raise ConfigError(f"MODEL ({folder}) must be a folder; name that of a model")
        if (folder / CONFIG_FILE).is_file() or not (folder / MODEL_CONFIG_FILE).is_file():
            return cls.of_checkpoint(folder, out, recipe)
        hf, name = read_json(folder / MODEL_CONFIG_FILE), folder.resolve().name
        if hf.get("model_type") in MOEPP_TYPES or is_zeda(hf):
            return cls(folder, hf, read_format(hf, name)[0], out, recipe)
        if source_kind(hf).moe is None:
            raise ConfigError(
                f"MODEL ({folder}) must be a mixture of experts, and is a dense "
                f"{hf['model_type']}; make one of it with moepp convert upcycle"
            )
        return cls(folder, hf, upcycled_config(hf, _NOTHING, name, None), out, recipe)

    def upcycled(self, added: Mapping[str, Any]) -> Config:
        """The model with new experts; ConfigError if its function cannot be kept."""
        assert self.hf is not None, "nothing is added to a checkpoint of ours"
        return upcycled_config(self.hf, Additions(**added), self.folder.resolve().name, None)

    def convert(self) -> None:
        """Make the checkpoints that are missing."""
        model, start = self.model.checkpoint, self.start.checkpoint
        if not model.exists() and self.config.moe.num_zero_computation_experts:
            hf_to_mcore(self.folder, model)
        elif not model.exists():
            upcycle(self.folder, model, _NOTHING)
        if not start.exists():
            upcycle(self.folder, start, Additions(**(self.added or {})))

    def exported(self) -> list[str]:
        """Export the trained model if that is not done; warnings."""
        done, model = self.is_exported(TRAINING_CONFIG_FILE), self.model.checkpoint
        return [] if done else mcore_to_hf(self.run, self.export, original=model)
