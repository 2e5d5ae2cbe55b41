"""The names of the implementations, with stand-ins for apex and Transformer Engine."""

import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from moepp_megatron.config import load_config
from moepp_megatron.runtime import backends, optional
from tests import ROOT
from tests.commands import captured, succeeded

APEX = {
    "apex": {},
    "apex.normalization": {},
    "apex.normalization.fused_layer_norm": {"fused_rms_norm_affine": lambda *args: "fused"},
    "amp_C": {},
    "fused_layer_norm_cuda": {},
    "fused_weight_gradient_mlp_cuda": {},
}


@pytest.fixture
def install(monkeypatch, forget_packages):
    """Puts modules where imports find them, and a GPU beside them."""
    import torch

    def install(*packages, gpu=True):
        for package in packages:
            for name, content in package.items():
                module = ModuleType(name)
                vars(module).update(content)
                module.__spec__ = ModuleSpec(name, None)
                monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        forget_packages()

    return install


def implementations(*cross_entropy):
    choices = backends.kernel_choices(*cross_entropy)
    return {choice.operation: choice.implementation for choice in choices}


def lines():
    return [choice.line() for choice in backends.kernel_choices()]


def test_attention_experts_and_permutation(install, monkeypatch):
    import torch

    install(gpu=False)
    assert lines()[:2] == [
        "attention: torch (megatron-core's, which writes all scores)",
        "experts: torch (one loop on oneDNN)",
    ]
    install()
    assert lines()[:3] == [
        "attention: torch (scaled_dot_product_attention, which writes no scores)",
        "experts: torch (grouped_mm in bf16, one after another in fp32)",
        "permutation: torch (sort and index_select)",
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "no grouped product on this GPU" in lines()[1]
    monkeypatch.setattr(backends, "have_transformer_engine", lambda: True)
    assert lines()[:3] == [
        "attention: Transformer Engine (DotProductAttention)",
        "experts: Transformer Engine (grouped product; torch's with moe.static_rows)",
        "permutation: Transformer Engine (fused)",
    ]


def test_cross_entropy(install, monkeypatch):
    install(gpu=False)
    assert backends.chosen_cross_entropy("auto") == "unfused"
    monkeypatch.setattr(backends, "have_triton", lambda: True)
    assert backends.chosen_cross_entropy("auto") == "fused"
    assert backends.chosen_cross_entropy("native") == "native"
    for wanted, used in (("auto", "Triton"), ("native", "torch"), ("unfused", "torch")):
        assert implementations(wanted)["cross entropy"] == used


def norm_and_accumulation():
    found = implementations()
    return found["RMSNorm"], found["gradient accumulation of linear layers"]


def test_each_part_of_apex_that_was_not_built_has_its_own_fallback(install):
    """apex is built with any subset of its extensions, and needs a GPU."""
    install()
    assert norm_and_accumulation() == ("torch", "torch")
    install(APEX)
    assert norm_and_accumulation() == ("apex", "apex")
    assert optional.fused_rms_norm()(1, 2, 3, 4) == "fused"
    install(APEX, gpu=False)
    assert norm_and_accumulation() == ("torch", "torch")


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("fused_layer_norm_cuda", ("torch", "apex")),
        ("fused_weight_gradient_mlp_cuda", ("apex", "torch")),
        ("amp_C", ("torch", "apex")),
    ],
)
def test_parts_of_apex(install, missing, expected):
    install({name: content for name, content in APEX.items() if name != missing})
    assert norm_and_accumulation() == expected


def test_apex_accumulates_more_than_transformer_engine(install, monkeypatch):
    install()
    monkeypatch.setattr(backends, "have_transformer_engine", lambda: True)
    assert norm_and_accumulation() == ("Transformer Engine", "Transformer Engine")
    assert any("but for the output layer" in line for line in lines())
    install(APEX)
    assert norm_and_accumulation() == ("Transformer Engine", "apex")


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("transformer_engine.pytorch.optimizers", "Transformer Engine"),
        ("transformer_engine_torch", "Transformer Engine"),
        ("apex.optimizers", "apex"),
        ("amp_C", "apex"),
        ("torch.optim.adamw", "torch"),
        ("another.package", "another"),
    ],
)
def test_what_megatron_core_has_chosen_is_named(install, monkeypatch, module, package):
    from megatron.core import optimizer

    chosen = type("Chosen", (), {"__module__": module})
    monkeypatch.setattr(optimizer, "Adam", chosen)
    monkeypatch.setattr(optimizer.clip_grads, "l2_norm_impl", chosen)
    install()
    assert implementations()["Adam"] == package
    assert implementations()["gradient norm and scaling"] == package


def test_the_log_has_one_line_with_every_choice(install):
    install()
    line = backends._choices_line(backends.optional_backends(), "auto")
    assert "\n" not in line
    for choice in lines():
        assert choice in line


def test_a_run_on_a_cpu_has_nothing_to_say_of_packages_for_gpus(install, monkeypatch):
    """None is used, and none could be; on a GPU, or where one is used, the line matters."""
    install(gpu=False)
    found = [replace(backend, used=False) for backend in backends.optional_backends()]
    monkeypatch.setattr(backends, "optional_backends", lambda: found)
    config = load_config(ROOT / "configs/quickstart.yaml", ["precision.cross_entropy=unfused"])
    assert backends.package_lines(config) == []
    install()
    assert backends._choices_line(found, "unfused") in backends.package_lines(config)
    assert "cross entropy: torch (megatron-core's, on" in backends._choices_line(found, "unfused")
    install(gpu=False)
    found[0] = replace(found[0], used=True)
    assert backends._choices_line(found, "unfused") in backends.package_lines(config)


def test_a_process_with_an_apex_on_its_path(tmp_path):
    """An apex of the modules that megatron-core asks for."""
    files = {
        "apex/__init__.py": "",
        "apex/optimizers.py": "from torch.optim import AdamW, SGD\n"
        "class FusedAdam(AdamW): pass\nclass FusedSGD(SGD): pass\n",
        "apex/multi_tensor_apply.py": "def multi_tensor_applier(*args): pass\n",
        "amp_C.py": "def multi_tensor_l2norm(*args): pass\ndef multi_tensor_scale(*args): pass\n",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    script = (
        f"import json, sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from moepp_megatron.runtime.backends import kernel_choices\n"
        "print(json.dumps([choice.line() for choice in kernel_choices()]))\n"
    )
    done = succeeded(captured([sys.executable, "-c", script], timeout=120))
    found = json.loads(done.stdout.splitlines()[-1])
    assert "Adam: apex (FusedAdam)" in found
    assert "gradient norm and scaling: apex (multi_tensor_l2norm)" in found
