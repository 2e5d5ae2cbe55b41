"""Compiles the CUDA runtime without a GPU, and starts programs on it."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.fake_gpu.real_packages import pinned

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def obstacle():
    """Why no GPU can be played here; None where one can."""
    here, tested = importlib.metadata.version("torch").partition("+")[0], pinned("torch")
    if here != tested:
        # A torch asks the runtime for symbols of its own.
        return f"the stub of the CUDA runtime is made for torch {tested}, not {here}"
    if shutil.which("gcc") is None:
        return "compiling the stub of the CUDA runtime needs gcc"
    if _headers() is None:
        return "the stub of the CUDA runtime needs the CUDA headers that Triton brings"
    return None


def _headers():
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    folder = Path(triton.origin).parent / "backends/nvidia/include"
    return folder if (folder / "driver_types.h").exists() else None


def build(folder):
    """Compile both libraries into `folder`."""
    for source, target in (
        ("runtime_stub.c", "libcudart_stub.so"),
        ("driver_stub.c", "libcuda.so.1"),
    ):
        command = ["gcc", "-shared", "-fPIC", f"-I{_headers()}", "-o", str(folder / target)]
        subprocess.run([*command, str(HERE / source)], check=True)


def play(folder, cases, engine=None, capability=9):
    """Play `cases` (`play.Case`) one after another in a process that has the GPU.

    Args:
        folder: Where `build` has put the libraries.
        cases: Fields of each case.
        engine: Transformer Engine for the process to have; none where None.
        capability: The first number of the GPU's compute capability.

    Returns:
        Fields of `play.Outcome` for each.
    """
    paths = [str(ROOT)] if engine is None else [str(ROOT), str(engine.python)]
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "LD_PRELOAD": str(folder / "libcudart_stub.so"),
        "CUDA_VISIBLE_DEVICES": "0",
        "FAKE_GPU_CAPABILITY": str(capability),
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCHDYNAMO_DISABLE": "1",
        # As a run with fine_grained_activation_offloading sets it; without has no effect.
        "NVTE_CPU_OFFLOAD_V1": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    arguments = [] if engine is None else [str(engine.source)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fake_gpu.play", *arguments],
        input=json.dumps(list(cases)),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    return found
