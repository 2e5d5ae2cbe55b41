"""Checks of the software: Python, torch, megatron-core, NCCL, and what is optional."""

import importlib.util
import os
import platform
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moepp_megatron.config import Config, UnfitError
from moepp_megatron.moe import upstream_versions
from moepp_megatron.runtime.backends import (
    Backend,
    kernel_choices,
    optional_backends,
    version_of,
)
from moepp_megatron.runtime.fit import check_fit, compiler_obstacle
from moepp_megatron.runtime.optional import OF_ALL, have_triton, how_to_install
from moepp_megatron.runtime.rank_environment import with_rank_variables
from moepp_megatron.tools.doctor.finding import Finding, Severity, error, judged, note, warning


def check_packages(config: Config | None) -> list[Finding]:
    """Check which packages are installed and used; one that `config` needs must be."""
    # Of what is imported, which a path can put before what is installed.
    megatron = version_of("megatron-core") and upstream_versions.version()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    findings = [
        Finding("Python", f"{platform.python_version()} at {sys.executable}"),
        Finding("torch", f"{torch.__version__}, built for {build}"),
        _check_megatron(megatron),
        _nccl(),
        _extra(),
    ]
    on_gpu = torch.cuda.is_available()
    findings += [_check_backend(backend, on_gpu) for backend in optional_backends()]
    findings += [_check_compiler(), _check_caches()] if have_triton() else []
    loss = "auto" if config is None else config.precision.cross_entropy
    if megatron is not None:
        # All of them are correct, some are faster.
        findings += [
            Finding(f"kernel: {choice.operation}", f"{choice.implementation}: {choice.detail}")
            for choice in kernel_choices(loss)
        ]
        if config is not None:
            findings.append(_check_config(config))
    return findings


def _check_megatron(version: str | None) -> Finding:
    """Check that a megatron-core whose internals the layer knows is installed."""
    problem = upstream_versions.version_problem(version)
    if problem is not None:
        rule, _, remedy = problem.partition("; ")
        return error("megatron-core", version or "not installed", rule, remedy)
    severity = Severity.OK if version == upstream_versions.TESTED_VERSION else Severity.NOTE
    return Finding("megatron-core", f"{version}", severity=severity)


def _check_backend(backend: Backend, on_gpu: bool = False) -> Finding:
    """Check an optional package; a missing one is a note, because it has a replacement."""
    if backend.used:
        return Finding(backend.name, f"{backend.version}: {backend.role}")
    if backend.failure is not None:
        return warning(
            backend.name,
            f"fails on import ({backend.failure}); instead {backend.fallback}",
            "what is installed must be importable",
            f"{backend.remedy}; or uninstall it",
        )
    state = "not installed" if backend.version is None else f"{backend.version}, not usable here"
    is_missed = on_gpu and backend.name == "Transformer Engine"
    judged, rule = (warning, "steps on a GPU are slower without") if is_missed else (note, "")
    remedy = backend.remedy if backend.version is None else "needs a GPU"
    return judged(backend.name, f"{state}; instead {backend.fallback}", rule, remedy)


def _extra() -> Finding:
    """Check for the packages of the extra `all`; commands refuse where they need one."""
    lacks = [package for name, package in OF_ALL.items() if importlib.util.find_spec(name) is None]
    if not lacks:
        return Finding("extra all", f"{len(OF_ALL)} packages")
    remedy = how_to_install("moepp_megatron[all]")
    rule = "commands that need one of them refuse"
    return warning("extra all", f"lacks {', '.join(lacks)}", rule, remedy)


def _check_compiler() -> Finding:
    """Check that Triton can compile its kernels' launchers."""
    obstacle = compiler_obstacle()
    lacks, remedy = obstacle or ("", "")
    found = f"lacks {lacks}" if obstacle else "a C compiler and Python.h"
    rule = "Triton needs it to start a kernel"
    return judged(obstacle is None, "Triton's compiler", found, rule, remedy, Severity.ERROR)


def _check_caches() -> Finding:
    """Check that what Triton and Inductor compile for a rank can be kept."""
    variables, found, lost = with_rank_variables(os.environ, 1), [], []
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        folder = variables.get(name)
        found.append(f"{name} {folder or 'not set'}")
        if folder is not None:
            place = next(each for each in (Path(folder), *Path(folder).parents) if each.exists())
            lost += [] if place.is_dir() and os.access(place, os.W_OK | os.X_OK) else [name]
    rule = "kernels are compiled again at each start if it cannot be written"
    remedy = f"set {' and '.join(lost)} to a folder of yours on this node, or unset it"
    return judged(not lost, "compiled kernels", ", ".join(found), rule, remedy, Severity.WARNING)


def _check_config(config: Config) -> Finding:
    """Check that this machine can run a configuration, as training does at its start."""
    try:
        check_fit(config)
    except UnfitError as refusal:
        rule, _, remedy = str(refusal).partition("; ")
        return error("configuration", "cannot run here", rule, remedy)
    return Finding("configuration", "can run with these packages")


def _nccl() -> Finding:
    """NCCL's version, where torch was built with it."""
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return note("NCCL", "not used without a GPU: gloo carries collectives")
    version = torch.cuda.nccl.version()
    return Finding("NCCL", ".".join(str(part) for part in version))
