"""Whether Triton can compile here: its launchers are C, compiled where a kernel runs first."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path


def compiler_obstacle() -> tuple[str, str] | None:
    """What Triton lacks for the first launch of a kernel, and the remedy; None where it can.

    It looks as Triton itself does (triton/runtime/build.py): for the compiler that CC names, gcc or
    clang, and for Python.h.
    """
    named = os.environ.get("CC")
    compiler = named or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        found = f" (CC is {named}, which is not there)" if named else ""
        return f"a C compiler{found}", "install gcc, or name a compiler with the variable CC"
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme, in whose place Triton takes the usual one.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    if not header.exists():
        package = f"python{sysconfig.get_python_version()}-dev"
        return f"the header {header}", f"install {package} (python3-devel on RPM systems)"
    return None
