"""The folder of `moepp thin`, and the models in it.

OUT/thin.json          the model, and the FFN share that it is brought to
OUT/model              the model as a checkpoint of ours: the frozen teacher
OUT/RECIPE-start       the checkpoint that training starts from
OUT/configs/NAME.yaml  the configuration of a run, for `moepp train` or `moepp slurm`
OUT/runs/NAME          the run
OUT/RECIPE-hf          the result for transformers and servers
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from moepp_megatron.config import Config, ConfigError, Layout, check_config, load_config
from moepp_megatron.config.json_file import read_json
from moepp_megatron.data.prepared_data import check_data
from moepp_megatron.data.same_tokenizer import check_model_tokenizer
from moepp_megatron.file_names import (
    CONFIG_FILE,
    MANIFEST_FILE,
    MODEL_CONFIG_FILE,
    THIN_FILE,
    TOKENIZER_FILE,
)
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.training.checkpoint import find_checkpoint
from moepp_megatron.training.checkpoint.files import plain_damage
from moepp_megatron.training.thin import Start

# Recipes that change the model itself at once.
_OTHER = ("topk",)
# Of a file of weights, to tell models apart that have the same sizes.
_SAMPLES, _SAMPLE_BYTES = 64, 4096

# What is particular about the new experts of a recipe, as fields of `interop.upcycle.Additions`.
_ADDS: dict[str, dict[str, Any]] = {"budget": {}, "zeda": {"keeps_function": False}}


@dataclass(frozen=True)
class ThinFolder:
    """The models of a recipe; what formats of others need, a subclass knows.

    Attributes:
        folder: Of the model that becomes cheaper.
        hf: Its `config.json`; None for a checkpoint of ours.
        config: Of it as a checkpoint of ours, nothing added.
        out: OUT, absolute.
        recipe: Name of the recipe.
    """

    folder: Path
    hf: Mapping[str, Any] | None
    config: Config
    out: Path
    recipe: str

    @classmethod
    def of_checkpoint(cls, name: Path, out: Path, recipe: str) -> Self:
        """ConfigError: there is none, or none whose tokens can do without an FFN expert."""
        checkpoint = find_checkpoint(name)
        config = load_config(checkpoint / CONFIG_FILE)
        if config.moe.num_zero_computation_experts == 0:
            raise ConfigError(
                f"MODEL ({name}) must have zero-computation experts, since none are added to a "
                "checkpoint of ours; name the folder of a Mixtral or a Qwen3-MoE"
            )
        return cls(checkpoint, None, config, out, recipe)

    def upcycled(self, added: Mapping[str, Any]) -> Config:
        """The model with new experts."""
        raise NotImplementedError

    @cached_property
    def model(self) -> Start:
        """The model itself, the teacher."""
        checkpoint = self.folder.resolve() if self.hf is None else self.out / "model"
        moe = self.config.moe
        share = moe.ffn_share if moe.num_zero_computation_experts else 1.0
        return Start(checkpoint, self._balanced(self.config), share)

    @cached_property
    def start(self) -> Start:
        """The model with what the recipe adds; ConfigError if no token would ever select it."""
        if self.added is None:
            return self.model
        config = self._balanced(self.upcycled(self.added))
        if config.moe.selection_bias and not self.keeps_function:
            raise ConfigError(
                f"--recipe ({self.recipe}) must be another one for MODEL ({self.folder}), whose "
                "selection bias would keep new experts unselected; use budget"
            )
        return Start(self.out / f"{self.recipe}-start", config, 1.0)

    @property
    def added(self) -> dict[str, Any] | None:
        """New experts; None where training starts from the model itself."""
        moe = self.config.moe
        if moe.num_zero_computation_experts or self.recipe not in _ADDS:
            return None
        # Copies of the input are new to the model, and cost more than they help (docs/evidence.md).
        counts = {"num_copy_experts": 0, "num_constant_experts": 0}
        counts["num_zero_experts"] = moe.num_ffn_experts // 2
        # Without residuals, which servers lack.
        return {**counts, "gating_residual": False, **_ADDS[self.recipe]}

    def _balanced(self, config: Config) -> Config:
        """With the source's coefficient of the balance loss, as in configs/upcycle/."""
        coefficient = (self.hf or {}).get("router_aux_loss_coef", config.moe.balance_coeff)
        moe = config.moe.model_copy(update={"balance_coeff": coefficient})
        return config.model_copy(update={"moe": moe})

    @property
    def keeps_function(self) -> bool:
        """Whether the start computes what the model does."""
        return (self.added or {}).get("keeps_function", self.recipe not in _OTHER)

    @property
    def export(self) -> Path:
        """The result for others."""
        return self.out / f"{self.recipe}-hf"

    @property
    def run(self) -> Path:
        """Where the recipe trains, in its last stage."""
        return self.out / "runs" / self.recipe

    def is_exported(self, settings: str) -> bool:
        """Whether the result is there; `settings`: its copy of the run's configuration.

        ConfigError: It is there, and the run has been trained on since.
        """
        newest = find_checkpoint(self.run, reason_against=plain_damage)
        file = self.export / settings
        if file.exists() and file.read_bytes() != (newest / CONFIG_FILE).read_bytes():
            raise ConfigError(
                f"{self.export} must be of {newest}, and is of an earlier training; move it away"
            )
        return self.export.exists()

    def check(self, config: Config, nproc: int) -> list[str]:
        """Warnings on a run; ConfigError for what it would refuse but the checkpoints."""
        Layout.from_config(config, nproc)
        warnings = [*check_config(config), *check_data(config)]
        check_model_tokenizer(config, self.folder / TOKENIZER_FILE)
        return warnings

    def claim(self, share: float) -> None:
        """Make OUT; ConfigError if it is of another model or share, or cannot be written."""
        file, digest = self.out / THIN_FILE, self._digest()
        own = {"ffn_share": share, "sha256": digest}
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if not any(self.out.iterdir()):
                write_atomic(file, json.dumps(own).encode())
            found = read_json(file) if file.exists() else {}
            if found == own:
                (self.out / "configs").mkdir(exist_ok=True)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"OUT ({self.out}) must be a folder that can be written ({error}); choose another"
            ) from None
        if found != own:
            what = "--ffn-share" if found.get("sha256") == digest else "MODEL"
            holds = "is of another" if found else "holds other files"
            raise ConfigError(
                f"OUT ({self.out}) must be new or of the same {what}, and {holds}; choose "
                "another folder"
            )

    def _digest(self) -> str:
        """Of the configuration and samples of the weights: those of two trainings differ."""
        name = MANIFEST_FILE if self.hf is None else MODEL_CONFIG_FILE
        digest = hashlib.sha256((self.folder / name).read_bytes())
        for file in sorted(self.folder.glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as weights:
                for place in range(0, size, max(size // _SAMPLES, _SAMPLE_BYTES)):
                    weights.seek(place)
                    digest.update(weights.read(_SAMPLE_BYTES))
        return digest.hexdigest()
