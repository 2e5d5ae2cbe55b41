"""Which optional packages are usable here. Nothing fails on import; use asks first."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def have_transformer_engine() -> bool:
    """Whether Transformer Engine's modules can be built: installed, and a GPU is present."""
    import torch

    if not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None:
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


@functools.cache
def have_apex() -> bool:
    """Whether NVIDIA apex is installed (the package of that name on PyPI is another one)."""
    return importlib.util.find_spec("amp_C") is not None


@functools.cache
def have_resiliency_on_gpu() -> bool:
    """Whether nvidia-resiliency-ext can watch kernels here."""
    import torch

    if not torch.cuda.is_available():
        return False
    return importlib.util.find_spec("nvidia_resiliency_ext") is not None


def have_wandb() -> bool:
    """Whether W&B's package is installed."""
    # It writes a folder of its own name, which Python takes for a package without a file.
    spec = importlib.util.find_spec("wandb")
    return spec is not None and spec.origin is not None


@functools.cache
def flex_backend() -> str | None:
    """What the flex dispatcher runs on here: "deepep", "hybridep", or None for nothing."""
    # Looked for first, because it takes no import of torch to see that it is missing.
    if importlib.util.find_spec("deep_ep") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP, HAVE_HYBRIDEP

    if HAVE_DEEP_EP:
        return "deepep"
    return "hybridep" if HAVE_HYBRIDEP else None
