"""Checks for the compilers and headers that a run needs at its start.

Triton's launchers are C, and are compiled where a kernel runs first. megatron-core has one
extension in C++, for recomputations that free an output after the forward pass and let it share the
memory of the recomputed one in the backward pass (megatron/core/tensor_parallel/random.py).
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from moepp_megatron.config import Config

# Members of training.recompute_modules that use the extension (CheckpointWithoutOutput).
_FREED_OUTPUTS = ("layernorm", "mla_up_proj", "moe_act")


def compiler_obstacle() -> tuple[str, str] | None:
    """Name what Triton lacks to launch its first kernel, and the remedy, or None.

    It looks as Triton itself does (triton/runtime/build.py): for the compiler that CC names, gcc or
    clang, and for Python.h.
    """
    return _lacks_compiler("C", "CC", ("gcc", "clang"), "gcc") or _lacks_header()


def extension_obstacle() -> tuple[str, str] | None:
    """Name what torch lacks to compile megatron-core's extension, and the remedy, or None.

    It looks as torch does (torch/utils/cpp_extension.py): for the compiler that CXX names or c++,
    and for ninja on the PATH; what it compiles includes Python.h.
    """
    lacks = _lacks_compiler("C++", "CXX", ("c++",), "g++")
    if lacks is None and shutil.which("ninja") is None:
        lacks = ("the program ninja on the PATH", "install ninja-build")
    return lacks or _lacks_header()


def modules_with_extension(config: Config) -> list[str]:
    """Members of `training.recompute_modules` for which megatron-core's extension is compiled."""
    training = config.training
    if training.recompute_granularity != "selective":
        return []
    return sorted(set(_FREED_OUTPUTS) & set(training.recompute_modules))


def _lacks_compiler(
    language: str, variable: str, usual: tuple[str, ...], package: str
) -> tuple[str, str] | None:
    named = os.environ.get(variable)
    compilers = [name for name in ((named,) if named else usual) if shutil.which(name) is not None]
    if compilers:
        return None
    given = f" ({variable} is {named}, which is not there)" if named else ""
    remedy = f"install {package}, or name a compiler with the variable {variable}"
    return f"a {language} compiler{given}", remedy


def _lacks_header() -> tuple[str, str] | None:
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme, in whose place Triton takes the usual one.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    if header.exists():
        return None
    package = f"python{sysconfig.get_python_version()}-dev"
    return f"the header {header}", f"install {package} (python3-devel on RPM systems)"
