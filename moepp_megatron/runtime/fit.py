"""Checks whether this machine can run a valid configuration.

Among them compilers: Triton's launchers are C, and are compiled where a kernel runs first.
megatron-core has one extension in C++, for recomputations that free an output after the forward
pass and let it share the memory of the recomputed one in the backward pass
(megatron/core/tensor_parallel/random.py).
"""

import os
import shutil
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

from moepp_megatron.config import Config, UnfitError
from moepp_megatron.runtime.optional import (
    TRANSFORMER_ENGINE,
    flex_backend,
    flex_backends,
    have_transformer_engine,
    have_triton,
    how_to_install,
    import_failure,
)

# By megatron-core's extensions/transformer_engine.py and moe_utils.py.
_TE_OF_SETTINGS = {
    "parallel.delay_wgrad_compute": (2, 3),
    "megatron.moe_router_fusion": (2, 6),
    "megatron.fused_residual_rmsnorm": (1, 13),
    "megatron.fused_single_qkv_rope": (2, 3),
    "megatron.fine_grained_activation_offloading": (2, 3),
}


def check_fit(config: Config) -> None:
    """Refuse (UnfitError) settings that would fail later in the start; needs no process group."""
    _check_optimizer(config)
    for name, needed in _TE_OF_SETTINGS.items():
        if attrgetter(name)(config):
            _check_engine(f"{name} (true)", needed, "false")
    if config.moe.dispatcher == "flex":
        _check_flex(config)
    if config.moe.static_rows_per_selection is not None:
        _check_static_rows(config)
    if config.training.cuda_graphs:
        _check_cuda_graphs(config)
    _check_triton(config)
    if config.data.reset_attention_mask and have_transformer_engine():
        _check_packed_sequences(config)
    if not have_transformer_engine():
        _check_recomputation(config)
    _check_extension(config)
    if config.model.latent_attention is not None and not have_transformer_engine():
        _check_local_latent_attention(config)
    obstacle = config.precision.fp8 and FP8Machine.this().obstacle(config)
    if obstacle is not None:
        raise UnfitError(obstacle)


def _check_optimizer(config: Config) -> None:
    kind = config.optimizer.kind
    if config.optimizer.is_emerging and find_spec("emerging_optimizers") is None:
        raise UnfitError(
            f"optimizer.kind ({kind}) must have the package emerging-optimizers, which is not "
            f"installed; {how_to_install('emerging-optimizers>=0.3')}, or use adam"
        )
    for name, (value, instead) in config.optimizer.of_fused_adam.items():
        # The first whose FusedAdam takes them (optimizers/fused_adam.py).
        _check_engine(f"optimizer.{name} ({str(value).lower()})", (2, 3), instead)


def _check_engine(setting: str, needed: tuple[int, ...], instead: str) -> None:
    """Refuse a setting, given with its value, where Transformer Engine is missing or too old."""
    version = FP8Machine.this().transformer_engine
    if version is not None and version >= needed:
        return
    lack = "Transformer Engine and a GPU, which this machine lacks"
    if version is not None:
        lack = f"Transformer Engine {_text(needed)} or newer, not {_text(version)}"
    raise UnfitError(
        f"{setting} must have {lack}; use {instead}, or install it where there is a GPU: "
        f"{TRANSFORMER_ENGINE}"
    )


def _check_triton(config: Config) -> None:
    fused, loss = config.moe.fused, config.precision.cross_entropy
    uses = [
        ("moe.fused", str(fused).lower(), fused and not config.moe.is_vanilla, "false"),
        ("precision.cross_entropy", loss, loss in ("auto", "fused"), "unfused"),
    ]
    for name, value, is_wanted, without in uses:
        if value in ("true", "fused") and not have_triton():
            raise UnfitError(
                f"{name} ({value}) must have a GPU and the package triton, which this machine "
                "lacks; use auto"
            )
        # Triton is asked for last: it imports torch.
        if is_wanted and (missing := compiler_obstacle()) is not None and have_triton():
            lacks, remedy = missing
            raise UnfitError(
                f"{name} ({value}) must have {lacks}, which Triton needs to start a kernel; "
                f"{remedy}, or use {without}"
            )


def _check_flex(config: Config) -> None:
    wanted = config.moe.flex_backend
    if (failure := import_failure("deep_ep")) is not None:
        raise UnfitError(
            "moe.dispatcher (flex) must have a package deep_ep that can be imported, and this one "
            f"fails ({failure}); repair it (DeepEP 2 looks for NCCL at EP_NCCL_ROOT_DIR), or use "
            "alltoall"
        )
    if not flex_backends():
        raise UnfitError(
            "moe.dispatcher (flex) must have a GPU and the package deep_ep (DeepEP or its "
            "hybrid-ep branch), which this machine lacks; use alltoall"
        )
    if flex_backend(wanted) is None:
        here = " or ".join(flex_backends())
        raise UnfitError(
            f"moe.flex_backend ({wanted}) must be in the installed deep_ep, which has {here}; "
            f"use {here}"
        )
    if config.precision.dtype != "bf16":
        raise UnfitError(
            f"precision.dtype ({config.precision.dtype}) must be bf16 with moe.dispatcher flex, "
            "because deep_ep's kernels carry 16-bit vectors; use bf16, or moe.dispatcher alltoall"
        )


def _check_recomputation(config: Config) -> None:
    """Refuse recomputations that megatron-core 0.19 has only with Transformer Engine's modules."""
    modules = _recomputed(config)
    lacking = [module for module in ("layernorm", "moe_act") if module in modules]
    if lacking:
        raise UnfitError(
            f"training.recompute_modules ({', '.join(modules)}) must not hold "
            f"{' or '.join(lacking)} without Transformer Engine, which megatron-core needs for "
            "it; leave it out, or use [moe]"
        )


def _check_extension(config: Config) -> None:
    modules = modules_with_extension(config)
    if modules and (missing := _extension_obstacle()) is not None:
        lacks, remedy = missing
        raise UnfitError(
            f"training.recompute_modules ({', '.join(modules)}) must have {lacks}, because "
            f"megatron-core compiles an extension for it; {remedy}, or leave it out"
        )


def _check_packed_sequences(config: Config) -> None:
    """Refuse what Transformer Engine's packed sequences would compute otherwise, or have not."""
    ranks = config.parallel.context_parallel_size
    if ranks > 1:
        raise UnfitError(
            f"parallel.context_parallel_size ({ranks}) must be 1 with data.reset_attention_mask "
            "where Transformer Engine is there: it shares out each document by itself, and needs "
            f"lengths that are multiples of {2 * ranks}; use 1, and more tensor-parallel ranks"
        )
    if config.model.latent_attention is not None:
        raise UnfitError(
            "model.latent_attention must be null with data.reset_attention_mask where Transformer "
            "Engine is there: its packed sequences have not been tried with values narrower than "
            "queries; leave one of the two out"
        )


def _check_local_latent_attention(config: Config) -> None:
    """Refuse widths that tensor ranks do not divide: megatron-core's local modules split them."""
    latent, ranks = config.model.latent_attention, config.parallel.tensor_model_parallel_size
    assert latent is not None, "the model has latent attention"
    for key, plus, width in (
        ("q_lora_rank", "", latent.q_lora_rank or 0),
        (
            "kv_lora_rank",
            ", with qk_pos_emb_head_dim added,",
            latent.kv_lora_rank + latent.qk_pos_emb_head_dim,
        ),
    ):
        if width % ranks:
            raise UnfitError(
                f"model.latent_attention.{key} ({getattr(latent, key)}) must{plus} be divisible by "
                f"parallel.tensor_model_parallel_size ({ranks}) where Transformer Engine is not "
                "there; use a multiple, or fewer tensor-parallel ranks"
            )


def _check_static_rows(config: Config) -> None:
    capability = FP8Machine.this().capability
    widths = config.model.hidden_size, config.expert_ffn_hidden_size
    is_fit = config.precision.dtype == "bf16" and not any(width % 8 for width in widths)
    if capability is not None and (capability < (9, 0) or not is_fit):
        raise UnfitError(
            f"moe.static_rows ({config.moe.static_rows}) must have bf16, widths of model and "
            "experts that 8 divides, and a Hopper GPU or newer, where a product takes its sizes "
            "from the device; use null"
        )


def _check_cuda_graphs(config: Config) -> None:
    import torch

    if not torch.cuda.is_available():
        raise UnfitError(
            f"training.cuda_graphs ({config.training.cuda_graphs}) must be empty without a GPU; "
            "use []"
        )


# Members of training.recompute_modules that use the extension (CheckpointWithoutOutput).
_FREED_OUTPUTS = ("layernorm", "mla_up_proj", "moe_act")


def compiler_obstacle() -> tuple[str, str] | None:
    """Name what Triton lacks to launch its first kernel, and the remedy, or None.

    It looks as Triton itself does (triton/runtime/build.py): for the compiler that CC names, gcc or
    clang, and for Python.h.
    """
    return _lacks_compiler("C", "CC", ("gcc", "clang"), "gcc") or _lacks_header()


def _extension_obstacle() -> tuple[str, str] | None:
    """Name what torch lacks to compile megatron-core's extension, and the remedy, or None.

    It looks as torch does (torch/utils/cpp_extension.py): for the compiler that CXX names or c++,
    and for ninja on the PATH; what it compiles includes Python.h.
    """
    lacks = _lacks_compiler("C++", "CXX", ("c++",), "g++")
    if lacks is None and shutil.which("ninja") is None:
        lacks = ("the program ninja on the PATH", "install ninja-build")
    return lacks or _lacks_header()


def modules_with_extension(config: Config) -> list[str]:
    """Members of `training.recompute_modules` for which megatron-core's extension is compiled."""
    return sorted(set(_FREED_OUTPUTS) & set(_recomputed(config)))


def _recomputed(config: Config) -> list[str]:
    """Modules that the backward pass recomputes, where it does not recompute whole layers."""
    training = config.training
    return training.recompute_modules if training.recompute_granularity == "selective" else []


def _lacks_compiler(
    language: str, variable: str, usual: tuple[str, ...], package: str
) -> tuple[str, str] | None:
    named = os.environ.get(variable)
    compilers = [name for name in ((named,) if named else usual) if shutil.which(name) is not None]
    if compilers:
        return None
    given = f" ({variable} is {named}, which is not there)" if named else ""
    remedy = f"install {package}, or name a compiler with the variable {variable}"
    return f"a {language} compiler{given}", remedy


def _lacks_header() -> tuple[str, str] | None:
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme, in whose place Triton takes the usual one.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    if header.exists():
        return None
    package = f"python{sysconfig.get_python_version()}-dev"
    return f"the header {header}", f"install {package} (python3-devel on RPM systems)"


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
    """Versions of a usable Transformer Engine and of torch's CUDA, and the GPU's capability."""

    transformer_engine: Version | None
    capability: Version | None
    cuda: Version | None

    @classmethod
    def this(cls) -> "FP8Machine":
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

    def obstacle(self, config: Config) -> str | None:
        """Explain in one line why it cannot run a configuration's FP8, or None."""
        precision = config.precision
        recipe = precision.recipe
        if recipe is None:
            return None
        off = "set precision.fp8 to null"
        start = f"precision.fp8 ({precision.fp8}) must have"
        if self.transformer_engine is None or self.capability is None:
            return (
                f"{start} Transformer Engine and a GPU, which this machine lacks; {off}, or "
                f"install it where there is a GPU: {TRANSFORMER_ENGINE}"
            )
        name = f"precision.fp8_recipe ({recipe}) must have"
        needed, without = _CAPABILITY[recipe], _FIRST_WITHOUT.get(recipe)
        if self.capability < needed or (without is not None and self.capability >= without):
            below, card = "", "H100: 9.0"
            if without is not None:
                below, card = f" and below {_text(without)}", "B200: 10.0"
            return (
                f"{name} a GPU of compute capability {_text(needed)}{below}, not "
                f"{_text(self.capability)}; {off}, or use another GPU ({card})"
            )
        if recipe == "blockwise" and (self.cuda is None or self.cuda < _CUDA_OF_BLOCKWISE):
            built_for = _text(self.cuda) if self.cuda else "none"
            return (
                f"{name} torch built for CUDA {_text(_CUDA_OF_BLOCKWISE)} or newer, not "
                f"{built_for}; use tensorwise, or a newer torch"
            )
        for setting, wanted in _engine_versions(config, recipe):
            if self.transformer_engine < wanted:
                return (
                    f"{setting} must have Transformer Engine {_text(wanted)} or newer, not "
                    f"{_text(self.transformer_engine)}; install a newer one, or change the setting"
                )
        return None


def _engine_versions(config: Config, recipe: str) -> list[tuple[str, Version]]:
    """For each setting in use, (setting with value, first Transformer Engine version with it)."""
    wanted: list[tuple[str, Version]] = [
        (f"precision.fp8_recipe ({recipe})", _TE_OF_RECIPE[recipe])
    ]
    if config.precision.fp8_param:
        wanted.append(("precision.fp8_param (true)", _TE_OF_FP8_PARAM))
    modules = _recomputed(config)
    if {"moe_act", "layernorm"} & set(modules):
        setting = f"training.recompute_modules ([{', '.join(modules)}]) with precision.fp8"
        wanted.append((setting, _TE_OF_INNER_RECOMPUTE))
    return wanted


def _text(version: Version) -> str:
    return ".".join(str(part) for part in version)
