"""Transformer Engine's part for torch compiles with the headers of wheels, as in `env.sh --te`."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from tests.fake_gpu.real_packages import ROOT, Unavailable, cuda_headers

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch for CUDA"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


@pytest.fixture(scope="module")
def headers():
    """An environment in which a compiler finds CUDA, cuDNN and NCCL as env.sh lets it find them."""
    try:
        site = cuda_headers(torch.version.cuda)
    except Unavailable as error:
        pytest.skip(str(error))
    environment = os.environ | {"PYTHONPATH": str(site)}
    script = "source <(sed -n '/^_moepp_cuda_headers/,/^}/p' launch/te.sh)"
    script += f"; _moepp_cuda_headers {Path(sys.prefix)}"
    command = ["bash", "-c", script]
    folders = subprocess.check_output(command, cwd=ROOT, env=environment, text=True).strip()
    assert folders, "the wheels of torch have CUDA's headers"
    return environment | {"CPLUS_INCLUDE_PATH": folders}


def compile_only(source, engine, environment):
    common = engine.source / "common_headers"
    places = [common, common / "common", common / "common/include", engine.source / "csrc"]
    places += [*include_paths(), sysconfig.get_path("include")]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-DNVTE_WITH_NCCL_EP", "-DUSE_NCCL"]
    command += ["-DTORCH_EXTENSION_NAME=transformer_engine_torch", "-w"]
    command += [str(source), *(f"-I{place}" for place in places)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{source.name}: {done.stderr[:2000]}"


def test_the_file_with_the_most_headers(transformer_engine, headers):
    compile_only(transformer_engine.source / "csrc/extensions/ep.cpp", transformer_engine, headers)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_file(transformer_engine, headers):
    for source in sorted(transformer_engine.source.glob("csrc/**/*.cpp")):
        compile_only(source, transformer_engine, headers)
