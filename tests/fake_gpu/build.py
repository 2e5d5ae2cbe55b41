"""Compiles the CUDA runtime without a GPU, and starts programs on it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def obstacle() -> str | None:
    """Why no GPU can be played here; None where one can."""
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None, "constraints.txt names torch"
    here = importlib.metadata.version("torch").partition("+")[0]
    if here != pinned[1]:
        # A torch asks the runtime for symbols of its own.
        return f"the stub of the CUDA runtime is made for torch {pinned[1]}, not {here}"
    if shutil.which("gcc") is None:
        return "compiling the stub of the CUDA runtime needs gcc"
    if _headers() is None:
        return "the stub of the CUDA runtime needs the CUDA headers that Triton brings"
    return None


def _headers() -> Path | None:
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    folder = Path(triton.origin).parent / "backends/nvidia/include"
    return folder if (folder / "driver_types.h").exists() else None


def build(folder: Path) -> None:
    """Compile both libraries into `folder`."""
    for source, target in (
        ("runtime_stub.c", "libcudart_stub.so"),
        ("driver_stub.c", "libcuda.so.1"),
    ):
        command = ["gcc", "-shared", "-fPIC", f"-I{_headers()}", "-o", str(folder / target)]
        subprocess.run([*command, str(HERE / source)], check=True)


def play(
    folder: Path, cases: Sequence[dict[str, Any]], transformer_engine: bool = False
) -> list[dict[str, Any]]:
    """Play `cases` (`play.Case`) one after another in a process that has the GPU.

    Args:
        folder: Where `build` has put the libraries.
        cases: Fields of each case.
        transformer_engine: Whether the process has the stand-in of Transformer Engine.

    Returns:
        Fields of `play.Outcome` for each.
    """
    paths = [str(ROOT)]
    if transformer_engine:
        paths.insert(0, str(ROOT / "tests/te_stand_in"))
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "LD_PRELOAD": str(folder / "libcudart_stub.so"),
        "CUDA_VISIBLE_DEVICES": "0",
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fake_gpu.play"],
        input=json.dumps(list(cases)),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found
