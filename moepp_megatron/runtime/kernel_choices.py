"""The implementation chosen for each operation that can be fused.

Some are megatron-core's choices, made on its import and read here; the others are this package's.
"""

from __future__ import annotations

from typing import NamedTuple

from moepp_megatron.config.schema.precision import CrossEntropy
from moepp_megatron.runtime.optional import (
    fused_rms_norm,
    have_fused_weight_gradient,
    have_transformer_engine,
    have_triton,
    hide_broken_packages,
)

TRANSFORMER_ENGINE, APEX, TORCH, TRITON = "Transformer Engine", "apex", "torch", "Triton"
# By the first part of a module's name; megatron-core's own functions call torch's operations.
_PACKAGES = {
    "transformer_engine": TRANSFORMER_ENGINE,
    "transformer_engine_torch": TRANSFORMER_ENGINE,
    "amp_C": APEX,
    "megatron": TORCH,
}
_LOSSES = {
    "fused": (TRITON, "its gradient written over the logits"),
    "native": (TORCH, "megatron-core's native fusion, on an fp32 copy"),
    "unfused": (TORCH, "megatron-core's, on an fp32 copy of the logits"),
}


class KernelChoice(NamedTuple):
    """One operation, the package whose code computes it, and how, in a few words."""

    operation: str
    implementation: str
    detail: str

    def line(self) -> str:
        """One line for the log and the table."""
        return f"{self.operation}: {self.implementation} ({self.detail})"


def kernel_choices(cross_entropy: CrossEntropy = "auto") -> list[KernelChoice]:
    """Every choice of this machine; imports torch and megatron-core."""
    hide_broken_packages()
    from megatron.core.optimizer import Adam, clip_grads

    chosen = {
        **(_of_transformer_engine() if have_transformer_engine() else _of_torch()),
        "cross entropy": _LOSSES[chosen_cross_entropy(cross_entropy)],
        "Adam": (_package(Adam), Adam.__name__),
        "gradient norm and scaling": (
            _package(clip_grads.l2_norm_impl),
            clip_grads.l2_norm_impl.__name__,
        ),
    }
    if have_fused_weight_gradient():
        # Before Transformer Engine, for it serves the output layer too.
        detail = "in the matrix product of the weight gradient"
        chosen["gradient accumulation of linear layers"] = (APEX, detail)
    return [KernelChoice(operation, *choice) for operation, choice in chosen.items()]


def chosen_cross_entropy(wanted: CrossEntropy) -> CrossEntropy:
    """Cross-entropy implementation: fused, native or unfused."""
    if wanted != "auto":
        return wanted
    return "fused" if have_triton() else "unfused"


def _of_transformer_engine() -> dict[str, tuple[str, str]]:
    details = {
        "attention": "DotProductAttention",
        "experts": "grouped product",
        "permutation": "fused",
        "RMSNorm": "fused with the linear layer after it",
        "gradient accumulation of linear layers": "in the matrix product of the weight gradient, "
        "but for the output layer",
    }
    return {operation: (TRANSFORMER_ENGINE, detail) for operation, detail in details.items()}


def _of_torch() -> dict[str, tuple[str, str]]:
    """Choices of model/local_modules.py and moe/spec.py."""
    import torch

    attention, experts = "megatron-core's, which writes all scores", "one loop on oneDNN"
    if torch.cuda.is_available():
        attention = "scaled_dot_product_attention, which writes no scores"
        experts = "one after another; no grouped product on this GPU"
        if torch.cuda.get_device_capability() >= (9, 0):
            experts = "grouped_mm in bf16, one after another in fp32"
    has_fused_norm = fused_rms_norm() is not None
    return {
        "attention": (TORCH, attention),
        "experts": (TORCH, experts),
        "permutation": (TORCH, "sort and index_select"),
        "RMSNorm": (APEX, "fused_rms_norm_affine") if has_fused_norm else (TORCH, "RMSNorm"),
        "gradient accumulation of linear layers": (TORCH, "added after the product"),
    }


def _package(implementation: object) -> str:
    root = str(getattr(implementation, "__module__", "")).partition(".")[0]
    return _PACKAGES.get(root, root)
