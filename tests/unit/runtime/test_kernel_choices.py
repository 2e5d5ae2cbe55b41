"""Which implementation is picked, with stand-ins for apex and Transformer Engine."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moepp_megatron.config import load_config
from moepp_megatron.runtime import backends, kernel_choices, optional

ROOT = Path(__file__).parents[3]
ADAM, MULTI_TENSOR, NORM, ACCUMULATION = range(4)
FUSED_ADAM = {"FusedAdam": object, "FusedSGD": object}
APEX: dict[str, dict[str, Any]] = {
    "apex": {},
    "apex.optimizers": FUSED_ADAM,
    "apex.multi_tensor_apply": {"multi_tensor_applier": object()},
    "apex.normalization": {},
    "apex.normalization.fused_layer_norm": {"fused_rms_norm_affine": lambda *args: "fused"},
    "amp_C": {"multi_tensor_l2norm": None, "multi_tensor_scale": None},
    "fused_layer_norm_cuda": {},
    "fused_weight_gradient_mlp_cuda": {},
}
TE: dict[str, dict[str, Any]] = {
    "transformer_engine": {},
    "transformer_engine.pytorch": {},
    "transformer_engine.pytorch.optimizers": {
        **FUSED_ADAM,
        "multi_tensor_applier": None,
        "multi_tensor_l2norm": None,
        "multi_tensor_scale": None,
        "multi_tensor_scale_tensor": None,
    },
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts modules where imports find them, and a GPU beside them."""
    import torch

    cached = [f for f in vars(optional).values() if isinstance(f, functools._lru_cache_wrapper)]

    def install(*packages: dict[str, dict[str, Any]], gpu: bool = True) -> None:
        for package in packages:
            for name, content in package.items():
                module = ModuleType(name)
                vars(module).update(content)
                module.__spec__ = ModuleSpec(name, None)
                monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        for function in cached:
            function.cache_clear()

    yield install
    for function in cached:
        function.cache_clear()


def implementations() -> list[str]:
    """Of what apex has a part in; what it has none in comes before."""
    return [choice.implementation for choice in kernel_choices.kernel_choices()[4:]]


def layers() -> list[str]:
    return [choice.line() for choice in kernel_choices.kernel_choices()[:3]]


def test_attention_experts_and_permutation(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    install(gpu=False)
    assert layers()[0] == "attention: torch (megatron-core's, which writes all scores)"
    assert layers()[1] == "experts: torch (one loop on oneDNN)"
    install()
    assert layers() == [
        "attention: torch (scaled_dot_product_attention, which writes no scores)",
        "experts: torch (grouped_mm in bf16, one after another in fp32)",
        "permutation: torch (sort and index_select)",
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "no grouped product on this GPU" in layers()[1]
    monkeypatch.setattr(kernel_choices, "have_transformer_engine", lambda: True)
    assert layers() == [
        "attention: Transformer Engine (DotProductAttention)",
        "experts: Transformer Engine (grouped product)",
        "permutation: Transformer Engine (fused)",
    ]


def test_cross_entropy(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(gpu=False)
    assert kernel_choices.chosen_cross_entropy("auto") == "unfused"
    monkeypatch.setattr(kernel_choices, "have_triton", lambda: True)
    assert kernel_choices.chosen_cross_entropy("auto") == "fused"
    assert kernel_choices.chosen_cross_entropy("native") == "native"
    for wanted, used in (("auto", "Triton"), ("native", "torch"), ("unfused", "torch")):
        (choice,) = (
            choice
            for choice in kernel_choices.kernel_choices(wanted)
            if choice.operation == "cross entropy"
        )
        assert choice.implementation == used


def without(package: dict[str, dict[str, Any]], *names: str) -> dict[str, dict[str, Any]]:
    return {name: content for name, content in package.items() if name not in names}


def test_torch_alone(install: Any) -> None:
    install()
    assert implementations() == ["torch"] * 4


def test_apex_alone(install: Any) -> None:
    install(APEX)
    assert implementations() == ["apex"] * 4
    assert optional.fused_rms_norm()(1, 2, 3, 4) == "fused"


def test_apex_without_a_gpu_fuses_nothing_that_needs_one(install: Any) -> None:
    install(APEX, gpu=False)
    assert implementations() == ["apex", "apex", "torch", "torch"]


@pytest.mark.parametrize(
    ("missing", "choice"),
    [
        ("apex.optimizers", ADAM),
        ("apex.multi_tensor_apply", MULTI_TENSOR),
        ("fused_layer_norm_cuda", NORM),
        ("fused_weight_gradient_mlp_cuda", ACCUMULATION),
    ],
)
def test_each_part_of_apex_that_was_not_built_has_its_own_fallback(
    install: Any, missing: str, choice: int
) -> None:
    """apex is built with any subset of its extensions."""
    install(without(APEX, missing))
    expected = ["apex"] * 4
    expected[choice] = "torch"
    assert implementations() == expected


def test_apex_without_its_base_extension(install: Any) -> None:
    install(without(APEX, "amp_C"))
    assert implementations() == ["apex", "torch", "torch", "apex"]


def test_transformer_engine_comes_first_but_where_apex_accumulates_more(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(TE)
    monkeypatch.setattr(kernel_choices, "have_transformer_engine", lambda: True)
    assert implementations() == ["Transformer Engine"] * 4
    assert "but for the output layer" in kernel_choices.kernel_choices()[-1].detail
    install(TE, APEX)
    assert implementations() == ["Transformer Engine"] * 3 + ["apex"]


def test_the_log_has_one_line_with_every_choice(install: Any) -> None:
    install()
    line = backends.choices_line()
    assert "\n" not in line
    for choice in kernel_choices.kernel_choices():
        assert choice.line() in line


def test_a_run_on_a_cpu_has_nothing_to_say_of_packages_for_gpus(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is used, and none could be; on a GPU, or where one is used, the line matters."""
    import torch

    install()
    found = [replace(backend, used=False) for backend in backends.optional_backends()]
    monkeypatch.setattr(backends, "optional_backends", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(ROOT / "configs/quickstart.yaml", ["precision.cross_entropy=unfused"])
    assert backends.choices_to_log(config) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.choices_to_log(config) == backends.choices_line("unfused")
    assert "cross entropy: torch (megatron-core's, on" in backends.choices_line("unfused")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found[0] = replace(found[0], used=True)
    assert backends.choices_to_log(config) == backends.choices_line("unfused")


PICKED = """
import json, sys
from megatron.core.optimizer import Adam, clip_grads, optimizer
from megatron.core.tensor_parallel import layers
from moepp_megatron.runtime.kernel_choices import kernel_choices
print(json.dumps({
    "adam": Adam.__module__,
    "l2norm": clip_grads.l2_norm_impl.__module__,
    "scale": optimizer.multi_tensor_scale_impl.__module__,
    "accumulation": layers._grad_accum_fusion_available,
    "ours": [choice.implementation for choice in kernel_choices()],
}))
"""


def picked_by_megatron(folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{PICKED}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    picked: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return picked


def test_megatron_core_picks_the_same_with_an_apex_on_the_path(tmp_path: Path) -> None:
    """An apex of the three modules that megatron-core asks for, in a process of its own."""
    files = {
        "apex/__init__.py": "",
        "apex/optimizers.py": "from torch.optim import AdamW, SGD\n"
        "class FusedAdam(AdamW): pass\nclass FusedSGD(SGD): pass\n",
        "apex/multi_tensor_apply.py": "def multi_tensor_applier(*args): pass\n",
        "amp_C.py": "def multi_tensor_l2norm(*args): pass\ndef multi_tensor_scale(*args): pass\n",
        "fused_weight_gradient_mlp_cuda.py": "",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    picked = picked_by_megatron(tmp_path)
    assert picked["adam"] == "apex.optimizers"
    assert picked["l2norm"] == picked["scale"] == "amp_C"
    assert picked["accumulation"]
    # Norm and accumulation need a GPU besides, which the machines of CI lack.
    assert picked["ours"][4:6] == ["apex", "apex"]


@pytest.mark.skipif(kernel_choices._adam().implementation != "torch", reason="one is installed")
def test_megatron_core_picks_the_same_without_either() -> None:
    from moepp_megatron.runtime import cpu_support

    # Before megatron-core is imported, as every run does.
    cpu_support.install()
    from megatron.core.optimizer import Adam, clip_grads, optimizer

    assert Adam.__module__.startswith("torch.optim")
    for function in (clip_grads.l2_norm_impl, optimizer.multi_tensor_scale_impl):
        assert function.__module__ == "megatron.core.utils"
    assert implementations() == ["torch"] * 4
