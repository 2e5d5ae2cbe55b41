"""Triton kernels for steps that a GPU spends on memory traffic and launches. Never required.

router.py          logits to gates, routing map and statistics, in one kernel each way
scores.py          the score functions inside that kernel
expert_groups.py   group-limited routing inside it
rows.py            index of each token's FFN rows
tags.py            selections counted by the tokens' tags
combine.py         FFN rows back to their tokens, plus zero-computation and shared experts
combine_triton.py  what `combine.py` launches
cross_entropy.py   the model's loss, over a vocabulary that tensor-parallel ranks share

Each computes what a few lines of PyTorch elsewhere in `moe/` compute, or megatron-core (the loss);
those lines are its definition, run wherever a kernel does not, and are what its tests compare it
with. Nothing here adds floating-point numbers in an order that depends on timing, so results repeat
to the bit.

Importing this package imports no Triton.
"""

import importlib.util

import torch

from moepp_megatron.layer_settings import Fused
from moepp_megatron.runtime.optional import have_triton


def use_kernels(fused: Fused) -> bool:
    """True if the kernels run in this process.

    Triton's interpreter (the variable TRITON_INTERPRET, set before Triton is imported) runs them
    on CPU tensors, thousands of times slower: only `fused=True` takes it.

    Raises:
        RuntimeError: If `fused` is True without a GPU with Triton and without the interpreter.
    """
    if fused == "auto" or not fused:
        return fused == "auto" and have_triton()
    if have_triton() or interprets():
        return True
    raise RuntimeError(
        "fused (True) must have a GPU and the package triton, which this machine lacks; use auto"
    )


def start_kernel(device: torch.device) -> None:
    """Compile and launch a small kernel; RuntimeError with the cause where none can run."""
    from moepp_megatron.moe.kernels.rows import rows_of_tokens

    try:
        rows_of_tokens(torch.zeros(1, 1, dtype=torch.bool, device=device), slots=1)
        torch.cuda.synchronize(device)
    except Exception as error:
        cause = " ".join(str(error).split())[:500]
        raise RuntimeError(f"{type(error).__name__}: {cause}") from error


def interprets() -> bool:
    """True if Triton's interpreter runs the kernels, on CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)
