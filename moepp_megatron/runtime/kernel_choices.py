"""Which implementation serves each operation that can be fused.

megatron-core decides most of this when it is imported: Transformer Engine first, then apex, then
torch. The same question is asked here in the same order, so that the log and `moepp doctor` can
show it; `tests/unit/runtime/test_kernel_choices.py` compares both answers.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from moepp_megatron.config.schema.precision import CrossEntropy
from moepp_megatron.runtime.optional import (
    fused_rms_norm,
    have_fused_weight_gradient,
    have_transformer_engine,
    have_triton,
)

TRANSFORMER_ENGINE, APEX, TORCH = "Transformer Engine", "apex", "torch"
_TRITON = "Triton"


@dataclass(frozen=True)
class KernelChoice:
    """One operation.

    Attributes:
        operation: What is computed.
        implementation: The package whose code is used.
        detail: How, in a few words.
    """

    operation: str
    implementation: str
    detail: str

    def line(self) -> str:
        """One line for the log and the table."""
        return f"{self.operation}: {self.implementation} ({self.detail})"


def kernel_choices(cross_entropy: CrossEntropy = "auto") -> list[KernelChoice]:
    """Every choice of this machine; imports torch and what is installed of the other two.

    Args:
        cross_entropy: `precision.cross_entropy`.
    """
    return [
        _attention(),
        _experts(),
        _permutation(),
        _cross_entropy(cross_entropy),
        _adam(),
        _multi_tensor(),
        _norm(),
        _gradient_accumulation(),
    ]


def _attention() -> KernelChoice:
    """The core attention of model/local_modules.py, or Transformer Engine's."""
    import torch

    if have_transformer_engine():
        return KernelChoice("attention", TRANSFORMER_ENGINE, "DotProductAttention")
    if torch.cuda.is_available():
        detail = "scaled_dot_product_attention, which writes no scores"
        return KernelChoice("attention", TORCH, detail)
    return KernelChoice("attention", TORCH, "megatron-core's, which writes all scores")


def _experts() -> KernelChoice:
    """The FFN experts of moe/spec.py."""
    import torch

    if have_transformer_engine():
        return KernelChoice("experts", TRANSFORMER_ENGINE, "grouped product")
    if not torch.cuda.is_available():
        return KernelChoice("experts", TORCH, "one loop on oneDNN")
    if torch.cuda.get_device_capability() >= (9, 0):
        return KernelChoice("experts", TORCH, "grouped_mm in bf16, one after another in fp32")
    return KernelChoice("experts", TORCH, "one after another; no grouped product on this GPU")


def _permutation() -> KernelChoice:
    """What sorts rows by expert, as `TransformerConfig.moe_permute_fusion` decides."""
    if have_transformer_engine():
        return KernelChoice("permutation", TRANSFORMER_ENGINE, "fused")
    return KernelChoice("permutation", TORCH, "sort and index_select")


def chosen_cross_entropy(wanted: CrossEntropy) -> CrossEntropy:
    """What computes the loss: fused, native or unfused."""
    if wanted != "auto":
        return wanted
    return "fused" if have_triton() else "unfused"


def _cross_entropy(wanted: CrossEntropy) -> KernelChoice:
    """The loss of model/cross_entropy.py."""
    name = "cross entropy"
    return {
        "fused": KernelChoice(name, _TRITON, "its gradient written over the logits"),
        "native": KernelChoice(name, TORCH, "megatron-core's native fusion, on an fp32 copy"),
        "unfused": KernelChoice(name, TORCH, "megatron-core's, on an fp32 copy of the logits"),
    }[chosen_cross_entropy(wanted)]


def _adam() -> KernelChoice:
    """The optimizer's kernel, as megatron/core/optimizer/__init__.py chooses it."""
    used = _first(
        (TRANSFORMER_ENGINE, {"transformer_engine.pytorch.optimizers": ["FusedAdam", "FusedSGD"]}),
        (APEX, {"apex.optimizers": ["FusedAdam", "FusedSGD"]}),
    )
    return KernelChoice("Adam", used, "torch.optim.AdamW" if used == TORCH else "FusedAdam")


def _multi_tensor() -> KernelChoice:
    """The multi-tensor kernels, as megatron/core/optimizer/clip_grads.py chooses them."""
    names = ["multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale"]
    names.append("multi_tensor_scale_tensor")
    used = _first(
        (TRANSFORMER_ENGINE, {"transformer_engine.pytorch.optimizers": names}),
        (APEX, {"amp_C": [], "apex.multi_tensor_apply": ["multi_tensor_applier"]}),
    )
    detail = "tensor by tensor" if used == TORCH else "multi-tensor l2norm and scale"
    return KernelChoice("gradient norm and scaling", used, detail)


def _norm() -> KernelChoice:
    """The norm of model/build.py and model/norm.py. megatron-core has only apex's LayerNorm."""
    if have_transformer_engine():
        return KernelChoice("RMSNorm", TRANSFORMER_ENGINE, "fused with the linear layer after it")
    if fused_rms_norm() is not None:
        return KernelChoice("RMSNorm", APEX, "fused_rms_norm_affine")
    return KernelChoice("RMSNorm", TORCH, "torch.nn.RMSNorm")


def _gradient_accumulation() -> KernelChoice:
    """What adds weight gradients to the buffers that are reduced: `training/setup.py`.

    Without apex megatron-core's own output layer adds its gradient afterwards.
    """
    name = "gradient accumulation of linear layers"
    if have_fused_weight_gradient():
        return KernelChoice(name, APEX, "in the matrix product of the weight gradient")
    if have_transformer_engine():
        detail = "in the matrix product of the weight gradient, but for the output layer"
        return KernelChoice(name, TRANSFORMER_ENGINE, detail)
    return KernelChoice(name, TORCH, "added after the product")


def _first(*candidates: tuple[str, dict[str, list[str]]]) -> str:
    """The first implementation whose modules and names can be imported; torch if there is none."""
    for owner, modules in candidates:
        try:
            for module, names in modules.items():
                imported = importlib.import_module(module)
                for name in names:
                    getattr(imported, name)
        except (ImportError, AttributeError):
            continue
        return owner
    return TORCH
