"""The models of `moepp thin`: what becomes cheaper, its teacher, and what training starts from.

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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config, ConfigError, Layout, check_config, load_config
from moepp_megatron.config.schema.moe import MoESection
from moepp_megatron.data.prepared_data import check_data
from moepp_megatron.data.same_tokenizer import check_model_tokenizer
from moepp_megatron.file_names import (
    CONFIG_FILE,
    MANIFEST_FILE,
    MODEL_CONFIG_FILE,
    TOKENIZER_FILE,
)
from moepp_megatron.interop.hf_config import MOEPP_TYPES
from moepp_megatron.interop.hf_source import read_json
from moepp_megatron.interop.to_mcore import hf_to_mcore, read_format
from moepp_megatron.interop.upcycle import Additions, upcycle, upcycled_config
from moepp_megatron.interop.upcycle_sources import source_kind
from moepp_megatron.interop.zeda import is_zeda
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.training.checkpoint import find_checkpoint
from moepp_megatron.training.thin import Start

_NOTHING = Additions(num_zero_experts=0, num_copy_experts=0, num_constant_experts=0)

# Recipes that change the model itself at once.
_OTHER = ("topk",)


def _new_experts(moe: MoESection) -> Additions:
    # As in configs/upcycle/: 1, 1, 2 for 8 FFN experts, and 1, 1, 30 for 128.
    constants = max(2, moe.num_ffn_experts // 4 - 2)
    return Additions(num_constant_experts=constants, gating_residual=False)


def _zero_experts(moe: MoESection) -> Additions:
    zero = moe.num_ffn_experts // 2
    return replace(_NOTHING, num_zero_experts=zero, gating_residual=False, keeps_function=False)


_ADDS = {"budget": _new_experts, "zeda": _zero_experts}


@dataclass(frozen=True)
class ThinModels:
    """The models of a recipe.

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
    def read(cls, folder: Path, out: Path, recipe: str) -> ThinModels:
        """ConfigError: no folder, or no model that takes experts by choice."""
        if not folder.is_dir():
            raise ConfigError(f"MODEL ({folder}) must be a folder; name that of a model")
        if (folder / CONFIG_FILE).is_file() or not (folder / MODEL_CONFIG_FILE).is_file():
            checkpoint = find_checkpoint(folder)
            config = load_config(checkpoint / CONFIG_FILE)
            if config.moe.num_zero_computation_experts == 0:
                raise ConfigError(
                    f"MODEL ({folder}) must have zero-computation experts, since none are added to "
                    "a checkpoint of ours; name the folder of a Mixtral or a Qwen3-MoE"
                )
            return cls(checkpoint, None, config, out, recipe)
        hf, name = read_json(folder / MODEL_CONFIG_FILE), folder.resolve().name
        if hf.get("model_type") in MOEPP_TYPES or is_zeda(hf):
            return cls(folder, hf, read_format(hf, name)[0], out, recipe)
        if source_kind(hf).moe is None:
            raise ConfigError(
                f"MODEL ({folder}) must be a mixture of experts, and is a dense "
                f"{hf['model_type']}; make one of it with moepp convert upcycle"
            )
        return cls(folder, hf, upcycled_config(hf, _NOTHING, name, None), out, recipe)

    @cached_property
    def model(self) -> Start:
        """The model itself, the teacher."""
        checkpoint = self.folder.resolve() if self.hf is None else self.out / "model"
        moe = self.config.moe
        share = moe.ffn_share if moe.num_zero_computation_experts else 1.0
        return Start(checkpoint, self._balanced(self.config), share)

    @cached_property
    def start(self) -> Start:
        """The model with what the recipe adds, of which no token selects anything yet."""
        if self.added is None or self.hf is None:
            return self.model
        config = upcycled_config(self.hf, self.added, self.folder.name, None)
        return Start(self.out / f"{self.recipe}-start", self._balanced(config), 1.0)

    @property
    def added(self) -> Additions | None:
        """New experts; None where training starts from the model itself."""
        moe, adds = self.config.moe, _ADDS.get(self.recipe)
        return None if moe.num_zero_computation_experts or adds is None else adds(moe)

    def _balanced(self, config: Config) -> Config:
        """With the source's coefficient of the balance loss, as in configs/upcycle/."""
        coefficient = (self.hf or {}).get("router_aux_loss_coef", config.moe.balance_coeff)
        moe = config.moe.model_copy(update={"balance_coeff": coefficient})
        return config.model_copy(update={"moe": moe})

    @property
    def keeps_function(self) -> bool:
        """Whether the start computes what the model does."""
        return self.recipe not in _OTHER if self.added is None else self.added.keeps_function

    @property
    def export(self) -> Path:
        """The result for others."""
        return self.out / f"{self.recipe}-hf"

    def check(self, config: Config, nproc: int) -> list[str]:
        """Warnings on a run; ConfigError for what it would refuse but the checkpoints."""
        Layout.from_config(config, nproc)
        check_model_tokenizer(config, self.folder / TOKENIZER_FILE)
        return [*check_config(config), *check_data(config)]

    def claim(self, share: float) -> None:
        """Make OUT; ConfigError if it is of another model or share, or cannot be written."""
        identity = self.folder / (MANIFEST_FILE if self.hf is None else MODEL_CONFIG_FILE)
        sizes = sorted((file.name, file.stat().st_size) for file in self.folder.glob("*.safet*"))
        digest = hashlib.sha256(identity.read_bytes() + repr(sizes).encode()).hexdigest()
        file, own = self.out / "thin.json", {"ffn_share": share, "sha256": digest}
        try:
            (self.out / "configs").mkdir(parents=True, exist_ok=True)
            if [path.name for path in self.out.iterdir()] == ["configs"]:
                write_atomic(file, json.dumps(own).encode())
        except OSError as error:
            raise ConfigError(
                f"OUT ({self.out}) must be a folder that can be written ({error.strerror}); choose "
                "another one"
            ) from None
        found = read_json(file) if file.exists() else {}
        if found != own:
            what = "--ffn-share" if found.get("sha256") == digest else "MODEL"
            raise ConfigError(
                f"OUT ({self.out}) must be new or of the same {what}, and is of another; choose "
                "another folder"
            )

    def convert(self) -> None:
        """Make the checkpoints that are missing."""
        if not self.model.checkpoint.exists():
            if self.config.moe.num_zero_computation_experts:
                hf_to_mcore(self.folder, self.model.checkpoint)
            else:
                upcycle(self.folder, self.model.checkpoint, _NOTHING)
        if not self.start.checkpoint.exists():
            upcycle(self.folder, self.start.checkpoint, self.added)
