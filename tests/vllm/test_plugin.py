"""Exports in vLLM's own model of them: text, log-probabilities, routes, rows multiplied."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.interop.vllm import VERSION, MoEPPModelConfig
from tests.interop.conftest import RunPlain, plain  # noqa: F401
from tests.interop.models import settings
from tests.interop.test_export import MODELS, save_and_compute
from tests.interop.test_serving import VLLM, greedy, needs_vllm
from tests.parallel.ranks import RankPools

ROOT = Path(__file__).parents[2]
METADATA = "from setuptools.build_meta import prepare_metadata_for_build_wheel as p; p(r'{}')"
FORMS: dict[str, dict[str, dict[str, Any]]] = MODELS | {
    "released": {"model": {"num_attention_heads": 1}, "moe": {"gate_normalization": "nonzero"}}
}
MODES = {
    "tensor parallel": {"tensor_parallel_size": 2},
    "expert parallel": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    # vLLM makes a stage's buffers on a CPU as it warms up, which eager execution leaves out.
    "stages": {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "distributed_executor_backend": "mp",
    },
}
RUNS = [
    ("paper", ""),
    ("released", ""),
    ("everything else", "tensor parallel"),
    ("everything else", "expert parallel"),
    ("everything else", "stages"),
    ("groups", "expert parallel"),
    ("groups without a bias", ""),
    ("biases", ""),
    ("norms over all heads", ""),
    ("vanilla, tied", ""),
    ("vanilla with a bias", ""),
]


def routes(folder: Path, prompt: list[int]) -> Any:
    """The picks of transformers' model, [tokens, MoE layers, K]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    lane: dict[int, Any] = {}
    with torch.no_grad():
        model.model(torch.tensor([prompt]), router_lane=lane)
        gates = {layer: model.model.layers[layer].mlp.moe.gate for layer in lane}
        return torch.stack([gates[layer].select(lane[layer])[1] for layer in sorted(lane)], 1)


@needs_vllm
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_it_computes_what_transformers_computes(
    ranks: RankPools,
    plain: RunPlain,  # noqa: F811
    tmp_path: Path,
    name: str,
    mode: str,
) -> None:
    from moepp_megatron.interop.to_hf import mcore_to_hf
    from moepp_megatron.moe.replay import checked_routes

    # vLLM's attention on a CPU has heads of 32 and more.
    model = {"num_layers": 3, "seq_length": 32, "kv_channels": 32}
    raw = settings(model=FORMS[name].get("model", {}) | model, moe=FORMS[name]["moe"])
    ranks(1).run(save_and_compute, raw, tmp_path / "checkpoints")
    layout = {"released": "released"}.get(name, "moepp")
    mcore_to_hf(tmp_path / "checkpoints", tmp_path / "hf", layout)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 64, random.integers(1, 25)).tolist() for _ in range(50)]
    files = [tmp_path / name for name in ("prompts.json", "found.json")]
    files[0].write_text(json.dumps(prompts))
    arguments = {"max_model_len": 32} | MODES.get(mode, {})
    program = Path(__file__).with_name("plugin_answers.py")
    # What pip installs: the package, and the metadata in which vLLM finds the entry point.
    subprocess.run([sys.executable, "-c", METADATA.format(tmp_path)], cwd=ROOT, check=True)
    done = subprocess.run(
        [str(VLLM), str(program), str(tmp_path / "hf"), *map(str, files)]
        + [f"{key}={json.dumps(value)}" for key, value in arguments.items()],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(files[1].read_text())

    workers = max(arguments.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
    assert found["modules"] == ["moepp_megatron.interop.vllm.model"] * workers
    for answer, wanted in zip(
        found["answers"], plain(greedy, tmp_path / "hf", prompts), strict=True
    ):
        assert answer["tokens"] == wanted["tokens"]
        # fp32, in another order of addition.
        np.testing.assert_allclose(answer["logprobs"], wanted["logprobs"], rtol=0, atol=1e-4)

    config = parse_config(raw)
    pattern = config.moe.moe_layer_pattern(3)
    rows, captured = zip(*found["watched"], strict=True)
    # A stage has its own layers' picks, and zeros elsewhere.
    union = np.maximum.reduce([np.array(picks) for picks in captured])
    expected = np.asarray(plain(routes, tmp_path / "hf", prompts[-1]))
    taken = checked_routes(union, len(prompts[-1]), pattern, config.moe)
    np.testing.assert_array_equal(taken, expected)
    multiplied = int((expected < config.moe.num_ffn_experts).sum())
    assert (rows[0] if mode == "tensor parallel" else sum(rows)) == multiplied > 0


def asked(**changes: Any) -> Any:
    """vLLM's configuration as far as the model looks at it."""
    hf = {"qk_norm": True, "qk_norm_scope": "head", "hidden_size": 64, "total_experts": 12}
    parallel: dict[str, Any] = dict.fromkeys(
        (f"{kind}_parallel_size" for kind in ("data", "tensor", "pipeline", "prefill_context")), 1
    ) | {"enable_expert_parallel": False, "enable_eplb": False}
    model = {"quantization": None, "enforce_eager": True, "model_arch_config": SimpleNamespace()}
    for section in (hf, parallel, model):
        section |= {key: value for key, value in changes.items() if key in section}
    model["hf_config"] = SimpleNamespace(**hf)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        model_config=SimpleNamespace(**model),
        lora_config=changes.get("lora_config"),
    )


@pytest.mark.parametrize(
    ("platform", "changes", "problem"),
    [
        ("cpu", {}, None),
        ("cuda", {}, None),
        ("cpu", {"data_parallel_size": 2}, "data_parallel_size (2) must be 1"),
        ("cpu", {"enable_eplb": True}, "enable_eplb (True) must be False"),
        ("cpu", {"lora_config": "r=8"}, "lora_config (r=8) must be None"),
        ("cpu", {"quantization": "fp8"}, "quantization (fp8) must be None"),
        ("cpu", {"hidden_size": 40}, "hidden_size (40) must be a multiple of 32"),
        ("cpu", {"pipeline_parallel_size": 2}, "enforce_eager (True) must be False"),
        ("cpu", {"qk_norm_scope": "all_heads", "tensor_parallel_size": 2}, "(2) must be 1"),
        ("cuda", {"enforce_eager": False}, "enforce_eager (False) must be True"),
        ("cuda", {"enable_expert_parallel": True}, "enable_expert_parallel (True) must be False"),
    ],
)
def test_what_it_does_not_compute_is_refused(
    monkeypatch: pytest.MonkeyPatch, platform: str, changes: dict[str, Any], problem: str | None
) -> None:
    module = ModuleType("vllm.platforms")
    module.current_platform = SimpleNamespace(is_cpu=lambda: platform == "cpu")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", module)
    config = asked(**changes)
    MoEPPModelConfig.verify_and_update_model_config(config.model_config)
    assert config.model_config.model_arch_config.num_experts == 12
    if problem is None:
        MoEPPModelConfig.verify_and_update_config(config)
        return
    with pytest.raises(ValueError, match="--model-impl transformers") as refused:
        MoEPPModelConfig.verify_and_update_config(config)
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_extra_names_the_version_that_the_model_is_written_for() -> None:
    assert f'vllm = ["vllm=={VERSION}.*"]' in (ROOT / "pyproject.toml").read_text()
