"""Detection of usable optional packages. Nothing fails on import; ask here before use."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

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
def have_apex() -> bool:
    """True if NVIDIA apex is installed (the package of that name on PyPI is another one)."""
    return importlib.util.find_spec("amp_C") is not None


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


def have_lm_eval() -> bool:
    """True if EleutherAI's lm-eval is installed."""
    return importlib.util.find_spec("lm_eval") is not None


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
