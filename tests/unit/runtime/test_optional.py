"""Optional packages that are there and break, and what Triton needs to compile."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from moepp_megatron.config import UnfitError, load_config
from moepp_megatron.runtime import fit, optional, rank_environment
from moepp_megatron.runtime.backends import optional_backends, package_lines
from moepp_megatron.tools.doctor import packages
from moepp_megatron.tools.doctor.finding import Severity
from tests import ROOT

MODEL = ROOT / "configs/models/moepp_0.6b_8_4.yaml"

FLEX = ("moe.dispatcher=flex", "parallel.expert_model_parallel_size=2")


@pytest.fixture
def installed(tmp_path, monkeypatch, forget_packages):
    """Puts a package of that name where imports find it."""
    before = set(sys.modules)

    def install(name, **modules):
        for module, source in modules.items():
            path = tmp_path / name / f"{module}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
            sys.modules.pop(name if module == "__init__" else f"{name}.{module}", None)
        forget_packages()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("deep_ep", "transformer_engine"):
            del sys.modules[name]


def test_deep_ep_without_its_nccl(installed):
    """DeepEP 2 asserts at import, which megatron-core does not catch."""
    installed(
        "deep_ep", __init__='from deep_ep import sub\nassert False, "Cannot find: nccl"', sub=""
    )
    assert optional.import_failure("deep_ep") == "AssertionError: Cannot find: nccl"
    # megatron-core is told that it is not installed.
    with pytest.raises(ImportError):
        import deep_ep  # noqa: F401
    assert "deep_ep.sub" not in sys.modules
    with pytest.raises(UnfitError, match=r"fails \(AssertionError: Cannot find: nccl\); repair"):
        fit.check_fit(load_config(MODEL, FLEX))
    backend = next(each for each in optional_backends() if each.name == "DeepEP")
    assert "fails on import (AssertionError" in backend.line()
    finding = packages._check_backend(backend)
    assert finding.severity is Severity.WARNING
    assert "EP_NCCL_ROOT_DIR" in finding.remedy


def test_transformer_engine_without_its_part_for_torch(installed):
    """Half of megatron-core would take it for a package that is there."""
    installed("transformer_engine", __init__="")
    failure = optional.import_failure("transformer_engine")
    assert failure == "ModuleNotFoundError: No module named 'transformer_engine.pytorch'"
    with pytest.raises(ImportError):
        import transformer_engine  # noqa: F401
    backend = optional_backends()[0]
    assert "--te" in packages._check_backend(backend).remedy


@pytest.mark.parametrize("package", ["transformer_engine", "deep_ep"])
def test_torch_loads_what_a_package_links_to(installed, tmp_path, package):
    """The wheels of both find libnccl.so.2 only in a process that has imported torch."""
    installed(package, __init__="import sys; assert 'torch' in sys.modules", pytorch="")
    program = "from moepp_megatron.runtime import optional; import sys; "
    program += f"assert 'torch' not in sys.modules; print(optional.import_failure('{package}'))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    found = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert found == "None\n"


def test_a_gpu_without_transformer_engine_is_worth_a_warning(monkeypatch):
    import torch

    config = load_config(MODEL)
    assert not any(line.startswith("warning") for line in package_lines(config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    doubt, _ = package_lines(config)
    assert doubt.startswith(
        "warning: Transformer Engine: not installed; instead megatron-core's local"
    )
    assert "launch/env.sh --te" in doubt
    engine = optional_backends()[0]
    assert packages._check_backend(engine, on_gpu=True).severity is Severity.WARNING
    assert packages._check_backend(engine).severity is Severity.NOTE


def test_packages_that_are_sound_or_absent_stay(installed):
    installed("transformer_engine", __init__="", pytorch="")
    assert optional.import_failure("transformer_engine") is None
    import transformer_engine.pytorch  # noqa: F401

    assert optional.import_failure("deep_ep") is None


def test_what_triton_compiles_with(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(fit.sysconfig, "get_paths", lambda scheme: {"include": tmp_path})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert fit.compiler_obstacle()[0] == "a C compiler"
    monkeypatch.setenv("CC", "mycc")
    assert fit.compiler_obstacle()[0] == "a C compiler (CC is mycc, which is not there)"
    monkeypatch.setattr(shutil, "which", lambda name: name)
    lacks, remedy = fit.compiler_obstacle()
    assert lacks == f"the header {tmp_path}/Python.h"
    assert f"python{sysconfig.get_python_version()}-dev" in remedy
    (tmp_path / "Python.h").touch()
    assert fit.compiler_obstacle() is None
    assert packages._check_compiler().severity is Severity.OK


def test_a_run_whose_kernels_cannot_start_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(fit, "have_triton", lambda: True)
    monkeypatch.setattr(fit, "compiler_obstacle", lambda: ("a C compiler", "install gcc"))
    with pytest.raises(UnfitError) as refused:
        fit.check_fit(load_config(MODEL, []))
    assert str(refused.value) == (
        "moe.fused (auto) must have a C compiler, which Triton needs to start a kernel; install "
        "gcc, or use false"
    )
    with pytest.raises(UnfitError, match=r"^precision.cross_entropy \(auto\) .* or use unfused$"):
        fit.check_fit(load_config(MODEL, ["moe.fused=false"]))
    fit.check_fit(load_config(MODEL, ["moe.fused=false", "precision.cross_entropy=unfused"]))
    monkeypatch.setattr(packages, "compiler_obstacle", lambda: ("a C compiler", "install gcc"))
    assert packages._check_compiler().severity is Severity.ERROR


RECOMPUTES = (
    "model.latent_attention.kv_lora_rank=16",
    "model.num_query_groups=null",
    "training.recompute_granularity=selective",
    "training.recompute_modules=[moe,mla_up_proj]",
)


def test_what_the_extension_is_compiled_with(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(fit.sysconfig, "get_paths", lambda scheme: {"include": tmp_path})
    there = set()
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    assert fit._extension_obstacle() == (
        "a C++ compiler",
        "install g++, or name a compiler with the variable CXX",
    )
    there.add("c++")
    assert fit._extension_obstacle() == (
        "the program ninja on the PATH",
        "install ninja-build",
    )
    there.add("ninja")
    assert fit._extension_obstacle()[0] == f"the header {tmp_path}/Python.h"
    (tmp_path / "Python.h").touch()
    assert fit._extension_obstacle() is None
    monkeypatch.setenv("CXX", "mycxx")
    assert fit._extension_obstacle()[0] == "a C++ compiler (CXX is mycxx, which is not there)"


def test_a_run_whose_extension_cannot_be_compiled_is_refused_at_once(monkeypatch):
    config = load_config(MODEL, RECOMPUTES)
    monkeypatch.setattr(fit, "_extension_obstacle", lambda: None)
    fit.check_fit(config)
    lacks = ("the program ninja on the PATH", "install ninja-build")
    monkeypatch.setattr(fit, "_extension_obstacle", lambda: lacks)
    with pytest.raises(UnfitError) as refused:
        fit.check_fit(config)
    assert str(refused.value) == (
        "training.recompute_modules (mla_up_proj) must have the program ninja on the PATH, because "
        "megatron-core compiles an extension for it; install ninja-build, or leave it out"
    )
    fit.check_fit(load_config(MODEL, [*RECOMPUTES, "training.recompute_modules=[moe]"]))
    assert packages._check_config(config).severity is Severity.ERROR


def test_an_extension_that_does_not_compile_is_said_before_the_model_is_built(monkeypatch):
    from megatron.core.tensor_parallel import random

    from moepp_megatron.training import setup

    def fails():
        raise RuntimeError("Error building extension\n'share_storage_ext'")

    monkeypatch.setattr(random, "_get_share_storage", fails)
    monkeypatch.setattr(setup, "build_model", lambda config: pytest.fail("the model is built"))
    with pytest.raises(UnfitError) as refused:
        setup.build_training_model(load_config(MODEL, RECOMPUTES))
    assert "(Error building extension 'share_storage_ext')" in str(refused.value)


def test_the_doctor_names_the_folders_of_compiled_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new/inductor"))
    kept = packages._check_caches()
    assert kept.severity is Severity.OK
    assert str(tmp_path / "new/inductor") in kept.found
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/inductor"))
    lost = packages._check_caches()
    assert lost.severity is Severity.WARNING
    assert lost.remedy.startswith("set TORCHINDUCTOR_CACHE_DIR to")


@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR"])
def test_what_is_compiled_is_kept_where_nobody_else_writes(monkeypatch, tmp_path, variable):
    monkeypatch.setattr(rank_environment.tempfile, "gettempdir", lambda: str(tmp_path))

    def cache():
        return rank_environment.with_rank_variables({}, 1).get(variable)

    folder = Path(cache())
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert cache() is None
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert cache() is None
    folder.unlink()
    folder.touch()
    assert cache() is None
