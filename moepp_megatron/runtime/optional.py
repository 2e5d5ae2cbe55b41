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
