"""Detection of usable optional packages. Nothing fails on import; ask here before use."""

import functools
import importlib
import importlib.util
import logging
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRANSFORMER_ENGINE = "launch/env.sh --te on a CUDA machine"
"""It is compiled against the installed torch."""


def how_to_install(*requirements: str) -> str:
    """A command for the Python that runs this; requirements as pip takes them (`wandb>=1`)."""
    from importlib import metadata

    # No registry has this package: where it is not installed, an extra is that of its folder.
    if not any(metadata.distributions(name="moepp-megatron")):
        folder = str(Path(__file__).parents[2])
        requirements = tuple(each.replace("moepp_megatron[", f"{folder}[") for each in requirements)
    return shlex.join([sys.executable, "-m", "pip", "install", *requirements])


OF_ALL = {
    "jinja2": "jinja2 (pages, Slurm scripts, chat templates)",
    "matplotlib": "matplotlib (plots of pages)",
    "numpy": "numpy (corpora, checkpoints)",
    "prometheus_client": "prometheus-client (metrics for Prometheus)",
    "psutil": "psutil (looks after processes)",
    "pyarrow": "pyarrow (parquet, Arrow and Zstandard files)",
    "pydantic": "pydantic (configurations)",
    "pynvml": "nvidia-ml-py (telemetry of GPUs)",
    "rich": "rich (tables on a terminal)",
    "tensorboard": "tensorboard (event files)",
    "tokenizers": "tokenizers (text to tokens and back)",
    "typer": "typer (the command line)",
    "yaml": "pyyaml (YAML files)",
}
"""The extra `all` of pyproject.toml: package and use, by the name that is imported."""


def missing(error: ModuleNotFoundError) -> str:
    """Describe a failed import in one line: package, its use, how to install it.

    The error itself is raised again if that is no package of the extra `all`.
    """
    package = OF_ALL.get((error.name or "").partition(".")[0])
    if package is None:
        raise error
    return f"{package} is not installed; {how_to_install('moepp_megatron[all]')}"


# Packages that megatron-core imports if they are installed, whether a run uses them or not, and
# what is imported of them.
_IMPORTED_BY_MEGATRON = {"transformer_engine": "transformer_engine.pytorch", "deep_ep": "deep_ep"}


@functools.cache
def import_failure(package: str) -> str | None:
    """Explain in one line why an installed package fails on import; None if it does not.

    Transformer Engine without its part for torch, or a DeepEP that does not find its NCCL, raises
    errors that megatron-core does not catch, or takes for a usable package. A package that
    fails is therefore hidden: later imports raise that it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        return None
    try:
        importlib.import_module("torch")  # loads NCCL from its wheel, to which both are linked
        importlib.import_module(_IMPORTED_BY_MEGATRON[package])
    except Exception as error:
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            del sys.modules[name]
        # Python then raises ModuleNotFoundError, which megatron-core does catch.
        sys.modules[package] = None  # type: ignore[assignment]
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def hide_broken_packages() -> None:
    """Have megatron-core do without packages that fail on import; call before importing it."""
    for package in _IMPORTED_BY_MEGATRON:
        import_failure(package)


def _have_on_gpu(package: str) -> bool:
    """True if a package is installed and a GPU is present."""
    # Looked for first: importing torch takes seconds before a user's mistake would be reported.
    if importlib.util.find_spec(package) is None:
        return False
    import torch

    return torch.cuda.is_available()


@functools.cache
def have_transformer_engine() -> bool:
    """True if Transformer Engine's modules can be built: installed, and a GPU is present."""
    if not _have_on_gpu("transformer_engine"):
        return False
    hide_broken_packages()
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


@functools.cache
def have_fused_weight_gradient() -> bool:
    """True if apex's kernel can fuse weight-gradient accumulation into the matrix product."""
    return _have_on_gpu("fused_weight_gradient_mlp_cuda")


@functools.cache
def fused_rms_norm() -> Callable[..., Any] | None:
    """Apex's fused RMSNorm, `f(input, weight, normalized_shape, eps)`, or None for torch's."""
    if not _have_on_gpu("amp_C"):
        return None
    try:
        module = importlib.import_module("apex.normalization.fused_layer_norm")
        # The function imports its kernels only when it is called.
        importlib.import_module("fused_layer_norm_cuda")
    except ImportError:
        return None
    function: Callable[..., Any] | None = getattr(module, "fused_rms_norm_affine", None)
    return function


def have_wandb() -> bool:
    """True if W&B's package is installed."""
    # It writes a folder of its own name, which Python takes for a package without a file.
    spec = importlib.util.find_spec("wandb")
    return spec is not None and spec.origin is not None


@functools.cache
def flex_backends() -> tuple[str, ...]:
    """The flex dispatcher's usable back ends, the preferred one first: deepep, hybridep."""
    if not _have_on_gpu("deep_ep"):
        return ()
    hide_broken_packages()
    from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP, HAVE_HYBRIDEP

    here = {"deepep": HAVE_DEEP_EP, "hybridep": HAVE_HYBRIDEP}
    return tuple(name for name, is_here in here.items() if is_here)


def flex_backend(wanted: str = "auto") -> str | None:
    """The back end of the flex dispatcher, "deepep" or "hybridep"; None if `wanted` is unusable."""
    here = flex_backends()
    if wanted == "auto":
        return here[0] if here else None
    return wanted if wanted in here else None


@functools.cache
def have_triton() -> bool:
    """True if Triton kernels run here: installed, and a GPU is present."""
    return _have_on_gpu("triton")


# One line each, with what it announces and why that is not news.
_LOGGERS = (
    # "No CUDA runtime is found": on every CPU machine.
    "torch.utils.cpp_extension",
    # "full_param_layout not provided": the layout is computed inside, as documented there.
    "megatron.core.distributed.distributed_data_parallel",
    # "MCore's async save is deprecated": also for synchronous saves.
    "megatron.core.dist_checkpointing.strategies.torch",
)
_MESSAGES = (
    # megatron-core announces on import every optional package that is missing; `moepp doctor`
    # reports the same on request.
    ".*Apex (is|are) not installed.*",
    # megatron-core imports its experimental classes whether they are used or not.
    "MimoModelConfig is experimental",
    # Its optimizer looks whether a parameter's copy has a gradient.
    "The .grad attribute of a Tensor that is not a leaf",
    # Untrue: said of FFN experts that a rank holds whole, where the rest of the model is
    # tensor-parallel and sequence-parallel.
    "`sequence_parallel` is set to `True`, but tensor",
    # From what it logs where there is no process group: a schedule that is only drawn.
    "Could not determine rank from torch.distributed",
    # From every configuration, whatever it says about CUDA graphs.
    "full scope is deprecated",
    # Reading a checkpoint's common part, which megatron-core does on each rank separately.
    "torch.distributed is disabled, unavailable",
    "The argument order of load has been changed",
)


def quiet() -> None:
    """Silence the messages, and hide packages that break megatron-core's import.

    Call before importing megatron-core; a second call has no effect.
    """
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    # Deprecations inside megatron-core and torch are for their developers.
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\..*")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    hide_broken_packages()


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
