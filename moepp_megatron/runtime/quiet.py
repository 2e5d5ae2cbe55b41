"""Prepares the import of other libraries: silences needless messages, hides broken packages."""

from __future__ import annotations

import logging
import warnings

from moepp_megatron.runtime.optional import hide_broken_packages

# One line each, with what it announces and why that is not news.
_LOGGERS = (
    # "No CUDA runtime is found": on every CPU machine.
    "torch.utils.cpp_extension",
    # "GPTModel IS DEPRECATED", which is true, at every construction: docs/upgrading.md says so.
    "megatron.core.models.gpt.gpt_model",
    # "full_param_layout not provided": the layout is computed inside, as documented there.
    "megatron.core.distributed.distributed_data_parallel",
    # "MCore's async save is deprecated": also for synchronous saves.
    "megatron.core.dist_checkpointing.strategies.torch",
)


def quiet() -> None:
    """Silence the messages, and hide packages that break megatron-core's import.

    Call before importing megatron-core; a second call has no effect.
    """
    # megatron-core announces on import every optional package that is missing; `moepp doctor`
    # reports the same on request.
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*")
    # megatron-core imports its experimental classes whether they are used or not.
    warnings.filterwarnings("ignore", message="MimoModelConfig is experimental")
    # Its optimizer looks whether a parameter's copy has a gradient.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # Untrue: said of FFN experts that a rank holds whole, where the rest of the model is
    # tensor-parallel and sequence-parallel, and stays so.
    warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`, but tensor")
    # From what it logs where there is no process group: a schedule that is only drawn.
    warnings.filterwarnings("ignore", message="Could not determine rank from torch.distributed")
    # From every configuration, whatever it says about CUDA graphs.
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    # Reading a checkpoint's common part, which megatron-core does on each rank separately.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
    warnings.filterwarnings("ignore", message="The argument order of load has been changed")
    # Deprecations inside megatron-core and torch are for their developers.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch)\..*")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(megatron|torch)\..*")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    hide_broken_packages()
