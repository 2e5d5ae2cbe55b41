"""The roles of optional packages on this machine, and their replacements where they are missing.

The training log shows this once where it matters; `moepp doctor` always shows it. Imports nothing
heavy by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from moepp_megatron.config import Config
from moepp_megatron.config.schema.precision import CrossEntropy
from moepp_megatron.runtime.install import TRANSFORMER_ENGINE, how_to_install
from moepp_megatron.runtime.kernel_choices import kernel_choices
from moepp_megatron.runtime.optional import (
    flex_backend,
    flex_backends,
    have_apex,
    have_transformer_engine,
    have_triton,
    have_wandb,
    import_failure,
)


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
    # apex of PyPI is another package, so a version shows nothing.
    apex = have_apex()
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


def package_warnings() -> list[str]:
    """Warnings about this machine's packages before a run on GPUs; imports torch."""
    import torch

    backends = optional_backends()
    broken = [backend for backend in backends if backend.failure is not None]
    warnings = [f"{backend.line()}; {backend.remedy}" for backend in broken]
    engine = backends[0]
    if torch.cuda.is_available() and not engine.used and engine.failure is None:
        warnings.append(f"{engine.line()}. Steps are slower; {engine.remedy}")
    return warnings


def choices_to_log(config: Config) -> str | None:
    """The choices for a run's log; none on a CPU, for which the packages have no use."""
    import torch

    if torch.cuda.is_available() or any(backend.used for backend in optional_backends()):
        return choices_line(config.precision.cross_entropy)
    return None


def choices_line(cross_entropy: CrossEntropy = "auto") -> str:
    """All choices in one line; imports torch."""
    backends = optional_backends()
    used = ", ".join(f"{b.name} {b.version}" for b in backends if b.used) or "none"
    missing = ", ".join(b.name for b in backends if not b.used) or "none"
    kernels = "; ".join(choice.line() for choice in kernel_choices(cross_entropy))
    return f"optional packages used: {used}; not used: {missing} (moepp doctor says why); {kernels}"


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
