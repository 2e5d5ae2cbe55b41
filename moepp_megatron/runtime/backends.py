"""The roles of optional packages on this machine, and the implementation chosen for each operation.

Some choices are megatron-core's, made on its import and read here; the others are this package's.

The training log shows this once where it matters; `moepp doctor` always shows it. Imports nothing
heavy by itself.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

from moepp_megatron.config import Config
from moepp_megatron.config.schema.precision import CrossEntropy
from moepp_megatron.runtime.optional import (
    TRANSFORMER_ENGINE,
    flex_backend,
    flex_backends,
    fused_rms_norm,
    have_fused_weight_gradient,
    have_transformer_engine,
    have_triton,
    have_wandb,
    hide_broken_packages,
    how_to_install,
    import_failure,
    version_of,
)

_ENGINE, _APEX, _TORCH, _TRITON = "Transformer Engine", "apex", "torch", "Triton"
# By the first part of a module's name; megatron-core's own functions call torch's operations.
_PACKAGES = {
    "transformer_engine": _ENGINE,
    "transformer_engine_torch": _ENGINE,
    "amp_C": _APEX,
    "megatron": _TORCH,
}
_LOSSES = {
    "fused": (_TRITON, "its gradient written over the logits"),
    "native": (_TORCH, "megatron-core's native fusion, on an fp32 copy"),
    "unfused": (_TORCH, "megatron-core's, on an fp32 copy of the logits"),
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
        chosen["gradient accumulation of linear layers"] = (_APEX, detail)
    return [KernelChoice(operation, *choice) for operation, choice in chosen.items()]


def chosen_cross_entropy(wanted: CrossEntropy) -> CrossEntropy:
    """Cross-entropy implementation: fused, native or unfused."""
    if wanted != "auto":
        return wanted
    return "fused" if have_triton() else "unfused"


def _of_transformer_engine() -> dict[str, tuple[str, str]]:
    details = {
        "attention": "DotProductAttention",
        "experts": "grouped product; torch's with moe.static_rows",
        "permutation": "fused",
        "RMSNorm": "fused with the linear layer after it",
        "gradient accumulation of linear layers": "in the matrix product of the weight gradient, "
        "but for the output layer",
    }
    return {operation: (_ENGINE, detail) for operation, detail in details.items()}


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
        "attention": (_TORCH, attention),
        "experts": (_TORCH, experts),
        "permutation": (_TORCH, "sort and index_select"),
        "RMSNorm": (_APEX, "fused_rms_norm_affine") if has_fused_norm else (_TORCH, "RMSNorm"),
        "gradient accumulation of linear layers": (_TORCH, "added after the product"),
    }


def _package(implementation: object) -> str:
    root = str(getattr(implementation, "__module__", "")).partition(".")[0]
    return _PACKAGES.get(root, root)


@dataclass(frozen=True)
class Backend:
    """One optional package; `version` is None where it is not installed.

    `failure` is why an installed one cannot be imported.
    """

    name: str
    version: str | None
    used: bool
    role: str
    fallback: str
    remedy: str
    failure: str | None = None

    def line(self) -> str:
        """One line for the log and the table."""
        if self.used:
            return f"{self.name} {self.version or ''}: {self.role}".replace("  ", " ")
        state = "not installed" if self.version is None else f"{self.version} not usable here"
        if self.failure is not None:
            state = f"installed and fails on import ({self.failure})"
        return f"{self.name}: {state}; instead {self.fallback}"


def optional_backends() -> list[Backend]:
    """Every optional package and the choice made; imports torch."""
    # apex of PyPI is another package, without this module, so a version shows nothing.
    apex = find_spec("amp_C") is not None
    return [
        Backend(
            "Transformer Engine",
            version_of("transformer-engine"),
            have_transformer_engine(),
            "linear layers, norms, attention, grouped FFN experts, FP8",
            "megatron-core's local layers, torch's attention and grouped product, this package's "
            "norm; no FP8",
            TRANSFORMER_ENGINE,
            import_failure("transformer_engine"),
        ),
        Backend(
            "apex",
            (version_of("apex") or "found") if apex else None,
            apex,
            "fused Adam, multi-tensor operations, norms, gradient accumulation, each where "
            "Transformer Engine does not do it",
            "torch's operations, or Transformer Engine's",
            "comes with NVIDIA's containers or from its source (not PyPI's apex)",
        ),
        Backend(
            "DeepEP",
            version_of("deep_ep"),
            flex_backend() is not None,
            f"moe.dispatcher=flex runs on {' or '.join(flex_backends())}",
            "moe.dispatcher=alltoall or allgather; flex is refused",
            "install deep_ep from its source on a machine with RDMA; DeepEP 2 looks for NCCL at "
            "EP_NCCL_ROOT_DIR",
            import_failure("deep_ep"),
        ),
        Backend(
            "Triton",
            version_of("triton"),
            have_triton(),
            "moe.fused=auto: routing and combining in one kernel each, forward and backward; "
            "precision.cross_entropy=auto: fused",
            "moe.fused=auto: plain torch operations; moe.fused=true is refused; "
            "precision.cross_entropy=auto: unfused",
            "comes with torch for CUDA",
        ),
        Backend(
            "W&B",
            version_of("wandb"),
            have_wandb(),
            "records are sent where observe.wandb.project is set",
            "metrics.jsonl, TensorBoard and moepp monitor; observe.wandb.project is refused",
            how_to_install("wandb"),
        ),
    ]


def package_lines(config: Config) -> list[str]:
    """Warnings about this machine's packages, and the choices made, for a run's log.

    Neither on a CPU, for which the packages have no use. Imports torch.
    """
    import torch

    backends, on_gpu = optional_backends(), torch.cuda.is_available()
    broken = [backend for backend in backends if backend.failure is not None]
    lines = [f"warning: {backend.line()}; {backend.remedy}" for backend in broken]
    engine = backends[0]
    if on_gpu and not engine.used and engine.failure is None:
        lines.append(f"warning: {engine.line()}. Steps are slower; {engine.remedy}")
    if on_gpu or any(backend.used for backend in backends):
        lines.append(_choices_line(backends, config.precision.cross_entropy))
    return lines


def _choices_line(backends: list[Backend], cross_entropy: CrossEntropy) -> str:
    """All choices in one line; imports torch."""
    used = ", ".join(f"{b.name} {b.version}" for b in backends if b.used) or "none"
    missing = ", ".join(b.name for b in backends if not b.used) or "none"
    kernels = "; ".join(choice.line() for choice in kernel_choices(cross_entropy))
    return f"optional packages used: {used}; not used: {missing} (moepp doctor says why); {kernels}"
