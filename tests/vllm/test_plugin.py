"""Exports in vLLM's own model of them: text, log-probabilities, routes, rows multiplied."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.interop.vllm import VERSION, _ModelConfig
from tests.interop.conftest import RunPlain, plain  # noqa: F401
from tests.interop.models import settings
from tests.interop.test_export import MODELS, save_and_compute
from tests.interop.test_serving import VLLM, greedy, needs_vllm, routes
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
METADATA = "from setuptools.build_meta import prepare_metadata_for_build_wheel as p; p(r'{}')"
FORMS = MODELS | {
    "released": {"model": {"num_attention_heads": 1}, "moe": {"gate_normalization": "nonzero"}}
}
MODES = {
    "eager": {"enforce_eager": True},
    "tensor parallel": {"tensor_parallel_size": 2},
    # Prompts in pieces, with other prompts and answers in one batch.
    "pieces": {"max_num_batched_tokens": 32, "max_num_seqs": 8},
    "expert parallel": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    # vLLM makes a stage's buffers on a CPU as it warms up, which eager execution leaves out.
    "stages": {
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "mp",
    },
}
RUNS = [
    ("paper", ""),
    ("everything else", "eager"),
    ("released", ""),
    ("everything else", "tensor parallel"),
    ("everything else", "expert parallel"),
    ("everything else", "stages"),
    ("groups", "expert parallel"),
    ("groups without a bias", "pieces"),
    ("biases", ""),
    ("norms over all heads", ""),
    ("vanilla, tied", ""),
    ("vanilla with a bias", ""),
]


def exported(ranks, folder, name):
    """Write an export of this form to `folder` / hf; the settings."""
    from moepp_megatron.interop.to_hf import mcore_to_hf

    # vLLM's attention on a CPU has heads of 32 and more.
    model = {"num_layers": 3, "seq_length": 32, "kv_channels": 32}
    raw = settings(model=FORMS[name].get("model", {}) | model, moe=FORMS[name].get("moe", {}))
    ranks(1).run(save_and_compute, raw, folder / "checkpoints")
    layout = {"released": "released"}.get(name, "moepp")
    mcore_to_hf(folder / "checkpoints", folder / "hf", layout)
    return raw


def installed(folder):
    """The environment of a program that finds what pip installs."""
    # The package, and the metadata in which vLLM finds the entry point.
    subprocess.run([sys.executable, "-c", METADATA.format(folder)], cwd=ROOT, check=True)
    return os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "VLLM_CACHE_ROOT": str(folder / "cache")}


def run(folder, **arguments):
    """The ended process of plugin_answers.py, which reads prompts.json and writes found.json."""
    program = Path(__file__).with_name("plugin_answers.py")
    return subprocess.run(
        [str(VLLM), str(program), "hf", "prompts.json", "found.json"]
        + [f"{key}={json.dumps(value)}" for key, value in arguments.items()],
        env=installed(folder),
        capture_output=True,
        text=True,
        cwd=folder,
    )


def answers(folder, **arguments):
    """50 prompts, and what plugin_answers.py found."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 64, random.integers(1, 25)).tolist() for _ in range(50)]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    done = run(folder, max_model_len=32, **arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return prompts, json.loads((folder / "found.json").read_text())


@needs_vllm
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_it_computes_what_transformers_computes(
    ranks,
    plain,  # noqa: F811
    tmp_path,
    name,
    mode,
):
    from moepp_megatron.moe.replay import checked_routes

    raw = exported(ranks, tmp_path, name)
    arguments = MODES.get(mode, {})
    prompts, found = answers(tmp_path, **arguments)
    if mode == "tensor parallel":
        # A second start finds what the first has compiled.
        assert answers(tmp_path, **arguments)[1]["answers"] == found["answers"]
    workers = max(arguments.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
    model = ["moepp_megatron.interop.vllm.model", not arguments.get("enforce_eager", False)]
    assert found["models"] == [model] * workers
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


def logprobs(folder, texts, dtype):
    """Log-probabilities by transformers of all tokens but each text's first, [n]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True).eval()
    with torch.no_grad():
        parts = [
            model(torch.tensor([text]))
            .logits[0, :-1]
            .float()
            .log_softmax(-1)[torch.arange(len(text) - 1), torch.tensor(text[1:])]
            for text in texts
        ]
    return torch.cat(parts).numpy()


@needs_vllm
@pytest.mark.timeout(900)
def test_it_rounds_to_bf16_as_transformers_does(
    ranks,
    plain,  # noqa: F811
    tmp_path,
):
    exported(ranks, tmp_path, "everything else")
    prompts, found = answers(tmp_path, dtype="bfloat16")
    texts = [a + b["tokens"] for a, b in zip(prompts, found["answers"], strict=True)]
    exact, rounded = (
        plain(logprobs, tmp_path / "hf", texts, dtype) for dtype in ("float32", "bfloat16")
    )
    ours = np.concatenate([answer["logprobs"] for answer in found["answers"]])
    # Of two orders of rounding the mean errors are of one size.
    assert 0 < np.abs(ours - exact).mean() < 1.5 * np.abs(rounded - exact).mean()


@needs_vllm
@pytest.mark.timeout(900)
def test_a_checkpoint_must_have_the_tensors_of_the_model(ranks, tmp_path):
    from safetensors.numpy import load_file, save_file

    exported(ranks, tmp_path, "paper")
    (tmp_path / "prompts.json").write_text("[[1]]")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    whole = load_file(file)
    expert = "model.layers.1.mlp.moe.experts.experts.{}.down_proj.weight"
    for given, problem in (
        ({name: value for name, value in whole.items() if name != expert.format(2)}, 2),
        (whole | {expert.format(99): whole[expert.format(2)]}, 99),
    ):
        save_file(given, file, metadata={"format": "pt"})
        done = run(tmp_path)
        rule = {2: "must be", 99: "must not be"}[problem]
        assert f"{expert.format(problem)} {rule} in the checkpoint" in done.stderr + done.stdout
        assert done.returncode != 0


@needs_vllm
@pytest.mark.timeout(900)
def test_it_answers_over_http(
    ranks,
    plain,  # noqa: F811
    tmp_path,
):
    exported(ranks, tmp_path, "paper")
    page = (ROOT / "docs/how_to/serve.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python (-m vllm.*) --model EXPORT (.*)$", page, re.M)
    port = free_port()
    words = f"{command[0]} --model hf {command[1]} --port {port} --max-model-len 32".split()
    few = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    asked = {"model": "hf", "prompt": [3, 1, 4], "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(asked | {"ignore_eos": True, "return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [str(VLLM), *words], cwd=tmp_path, env=installed(tmp_path) | few, stdout=out, stderr=out
        )
    try:
        while True:
            assert server.poll() is None, log.read_text()
            try:
                answer = json.load(urllib.request.urlopen(request))
                break
            except urllib.error.URLError:
                time.sleep(1)
    finally:
        server.terminate()
        server.wait()
    (wanted,) = plain(greedy, tmp_path / "hf", [asked["prompt"]])
    assert answer["choices"][0]["token_ids"] == wanted["tokens"]


@needs_vllm
@pytest.mark.timeout(600)
def test_static_shapes_multiply_the_rows_of_ffn_experts_only(tmp_path):
    program, out = Path(__file__).with_name("static_experts.py"), tmp_path / "found.json"
    done = subprocess.run(
        [str(VLLM), str(program), str(out)], env=installed(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name, found in json.loads(out.read_text()).items():
        assert found["rows"] == found["picked"], name
        # fp32 against fp64, or in another order of addition, of the largest number.
        assert max(found["kernels"], found["layer"], found["ranks"]) < 2e-6, name
        assert found["compiled"] == 0.0, name
        assert found["unbacked"] == [], name
        assert (found["reads"], found["launches"]) == ({}, {"fused_moe_kernel": 2}), name
        assert "expert_map (None) must be there" in found["without a map"], name


def asked(**changes):
    """vLLM's configuration as far as the model looks at it."""
    hf = {"qk_norm": True, "qk_norm_scope": "head", "hidden_size": 64, "total_experts": 12}
    parallel = dict.fromkeys(
        (f"{kind}_parallel_size" for kind in ("data", "tensor", "pipeline", "prefill_context")), 1
    ) | dict.fromkeys(("enable_expert_parallel", "enable_eplb", "enable_ep_weight_filter"), False)
    model = {"quantization": None, "enforce_eager": True, "model_arch_config": SimpleNamespace()}
    for section in (hf, parallel, model):
        section |= {key: value for key, value in changes.items() if key in section}
    model["hf_config"] = SimpleNamespace(**hf)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        model_config=SimpleNamespace(**model),
        kernel_config=SimpleNamespace(moe_backend=changes.get("moe_backend", "auto")),
        lora_config=changes.get("lora_config"),
    )


@pytest.mark.parametrize(
    ("platform", "changes", "problem"),
    [
        ("cpu", {}, None),
        ("cuda", {}, None),
        ("cpu", {"data_parallel_size": 2}, "data_parallel_size (2) must be 1"),
        ("cpu", {"enable_eplb": True}, "enable_eplb (True) must be False"),
        ("cpu", {"enable_ep_weight_filter": True}, "filter (True) must be False"),
        ("cpu", {"lora_config": "r=8"}, "lora_config (r=8) must be None"),
        ("cpu", {"quantization": "fp8"}, "quantization (fp8) must be None"),
        ("cpu", {"hidden_size": 40}, "hidden_size (40) must be a multiple of 32"),
        ("cpu", {"pipeline_parallel_size": 2}, "enforce_eager (True) must be False"),
        ("cpu", {"qk_norm_scope": "all_heads", "tensor_parallel_size": 2}, "(2) must be 1"),
        ("cuda", {"enforce_eager": False, "enable_expert_parallel": True}, None),
        ("cuda", {"moe_backend": "aiter"}, "moe_backend (aiter) must be triton"),
    ],
)
def test_what_it_does_not_compute_is_refused(monkeypatch, platform, changes, problem):
    module = ModuleType("vllm.platforms")
    module.current_platform = SimpleNamespace(is_cpu=lambda: platform == "cpu")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", module)
    config = asked(**changes)
    _ModelConfig.verify_and_update_model_config(config.model_config)
    assert config.model_config.model_arch_config.num_experts == 12
    if problem is None:
        _ModelConfig.verify_and_update_config(config)
        wanted = {"cpu": "auto", "cuda": "triton"}[platform]
        assert config.kernel_config.moe_backend == wanted
        return
    with pytest.raises(ValueError, match="--model-impl transformers") as refused:
        _ModelConfig.verify_and_update_config(config)
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_extra_names_the_version_that_the_model_is_written_for():
    assert f'vllm = ["vllm=={VERSION}.*"]' in (ROOT / "pyproject.toml").read_text()
