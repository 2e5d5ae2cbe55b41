"""FP8 support of this machine: GPU, Transformer Engine and CUDA, per recipe."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.config import Config
from moepp_megatron.runtime.optional import TRANSFORMER_ENGINE, have_transformer_engine

Version = tuple[int, ...]

# The first Transformer Engine with the recipe in megatron-core 0.19.2 (fp8_utils.py,
# `get_fp8_recipe`; transformer_config.py for FP8 grouped GEMMs, which all of them need).
_TE_OF_RECIPE = {"delayed": (1, 11), "tensorwise": (2, 2), "blockwise": (2, 3), "mxfp8": (2, 1)}
# fp8_utils.py, `_quantize_param_shard_impl`: one FP8 weight at a time in the recipe's own format.
_TE_OF_FP8_PARAM: Version = (2, 3)
# transformer_config.py: recomputing moe_act or layernorm keeps their consumers' bf16 inputs.
_TE_OF_INNER_RECOMPUTE: Version = (2, 6)
# Transformer Engine's quantization.py, `_compute_fp8_support` and others.
_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
_FIRST_WITHOUT = {"mxfp8": (12, 0)}
_CUDA_OF_BLOCKWISE: Version = (12, 9)


@dataclass(frozen=True)
class FP8Machine:
    """The properties of a machine that FP8 needs.

    Attributes:
        transformer_engine: Its version; None where its modules cannot be built.
        capability: Compute capability of the GPU, None without one.
        cuda: The CUDA version that torch was built for, None for a CPU build.
    """

    transformer_engine: Version | None
    capability: Version | None
    cuda: Version | None

    @classmethod
    def this(cls) -> FP8Machine:
        """Describe the machine that this process runs on; imports torch."""
        import torch

        engine = None
        if have_transformer_engine():
            from megatron.core.utils import get_te_version

            engine = tuple(get_te_version().release)
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        built = torch.version.cuda
        cuda = None if built is None else tuple(int(part) for part in built.split("."))
        return cls(engine, capability, cuda)


def fp8_obstacle(config: Config, machine: FP8Machine) -> str | None:
    """Explain in one line why a machine cannot run a configuration's FP8, or None."""
    precision = config.precision
    recipe = precision.recipe
    if recipe is None:
        return None
    off = "set precision.fp8 to null"
    start = f"precision.fp8 ({precision.fp8}) must have"
    if machine.transformer_engine is None or machine.capability is None:
        return (
            f"{start} Transformer Engine and a GPU, which this machine lacks; {off}, or install "
            f"it where there is a GPU: {TRANSFORMER_ENGINE}"
        )
    name = f"precision.fp8_recipe ({recipe}) must have"
    needed, without = _CAPABILITY[recipe], _FIRST_WITHOUT.get(recipe)
    if machine.capability < needed or (without is not None and machine.capability >= without):
        below, card = "", "H100: 9.0"
        if without is not None:
            below, card = f" and below {_text(without)}", "B200: 10.0"
        return (
            f"{name} a GPU of compute capability {_text(needed)}{below}, not "
            f"{_text(machine.capability)}; {off}, or use another GPU ({card})"
        )
    if recipe == "blockwise" and (machine.cuda is None or machine.cuda < _CUDA_OF_BLOCKWISE):
        built_for = _text(machine.cuda) if machine.cuda else "none"
        return (
            f"{name} torch built for CUDA {_text(_CUDA_OF_BLOCKWISE)} or newer, not {built_for}; "
            "use tensorwise, or a newer torch"
        )
    for setting, wanted in _engine_versions(config, recipe):
        if machine.transformer_engine < wanted:
            return (
                f"{setting} must have Transformer Engine {_text(wanted)} or newer, not "
                f"{_text(machine.transformer_engine)}; install a newer one, or change the setting"
            )
    return None


def _engine_versions(config: Config, recipe: str) -> list[tuple[str, Version]]:
    """For each setting in use, (setting with value, first Transformer Engine version with it)."""
    training = config.training
    wanted: list[tuple[str, Version]] = [
        (f"precision.fp8_recipe ({recipe})", _TE_OF_RECIPE[recipe])
    ]
    if config.precision.fp8_param:
        wanted.append(("precision.fp8_param (true)", _TE_OF_FP8_PARAM))
    inner = {"moe_act", "layernorm"} & set(training.recompute_modules)
    if training.recompute_granularity == "selective" and inner:
        modules = ", ".join(training.recompute_modules)
        setting = f"training.recompute_modules ([{modules}]) with precision.fp8"
        wanted.append((setting, _TE_OF_INNER_RECOMPUTE))
    return wanted


def _text(version: Version) -> str:
    return ".".join(str(part) for part in version)
