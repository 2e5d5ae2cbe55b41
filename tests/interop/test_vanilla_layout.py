"""Exports as a vanilla MoE: transformers' own classes and llama.cpp compute what we compute."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from moepp_megatron.config import parse_config
from tests import ROOT
from tests.commands import captured, succeeded
from tests.interop.checkpoints import mcore_to_hf
from tests.interop.models import settings
from tests.interop.test_export import LOGITS, TOKENS, save_and_compute
from tests.interop.test_serving import greedy
from tests.refusals import config_error

# More ids than the tokenizer has tokens; ggml multiplies rows of 32 numbers and more.
MODEL = {"vocab_size": 640}
MOE = {
    "gating_residual": False,
    "num_constant_experts": 0,
    "num_copy_experts": 0,
    "num_zero_experts": 2,
    "ffn_hidden_size": 32,
}
DIVIDED = {"gate_normalization": "selected"}
NORMS = {"qk_layernorm": True, "kv_channels": 16, "num_query_groups": 2}
# The model that it is written as, settings of the model, settings of the layer.
CASES = {
    "raw gates": ("Deepseek", {"num_query_groups": 2}, {"router_topk": 3}),
    "shared": ("Deepseek", {"tie_embeddings": True}, {"shared_expert_ffn_hidden_size": 64}),
    "divided gates": ("Mixtral", {"kv_channels": 16}, DIVIDED),
    "no zero experts": ("Mixtral", {"tie_embeddings": True}, DIVIDED | {"num_zero_experts": 0}),
    "norms": ("Qwen3Moe", NORMS, DIVIDED),
}
TEXTS = [
    "def read(self, size=-1):\n",
    "  It's 2026:\tthe 1st  of many\n\n\n",
    "\u00fc \u732b\u0301 x",
]
LLAMA_CPP, PYTHON = (os.environ.get(f"MOEPP_LLAMA_CPP{name}", "") for name in ("", "_PYTHON"))


def export(ranks, folder, case):
    """Export a random model to folder/vanilla and folder/moepp; our logits."""
    name, model, moe = CASES[case]
    raw = settings(model=MODEL | model, moe=MOE | moe)
    (ours,) = ranks(1).run(save_and_compute, raw, folder / "checkpoints")
    mcore_to_hf(folder / "checkpoints", folder / "moepp")
    warnings = mcore_to_hf(folder / "checkpoints", folder / "vanilla", "vanilla")
    assert any("zero experts became FFN" in text for text in warnings) == ("no zero" not in case)
    assert any("one of zeros" in text for text in warnings) == (case == "raw gates")
    card = (folder / "vanilla/README.md").read_text()
    assert ("zero experts are FFN experts of zeros" in card) == ("no zero" not in case)
    assert ("transformers" in card.partition("## Use")[2]) == (name != "Deepseek")
    fields = json.loads((folder / "vanilla/config.json").read_text())
    assert fields["architectures"] == [f"{name}ForCausalLM"]
    return ours


def as_qwen2(folder):
    """Rewrite DeepSeek-MoE, which transformers lacks, as Qwen2-MoE, whose gates of 0 are 1/2."""
    import torch
    from safetensors.torch import load_file, save_file

    fields = json.loads((folder / "config.json").read_text())
    width = fields["n_shared_experts"] * fields["moe_intermediate_size"]
    fields |= {"model_type": "qwen2_moe", "num_experts": fields["n_routed_experts"]}
    fields |= {"qkv_bias": False, "shared_expert_intermediate_size": width}
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        layer, is_shared, _ = name.partition("shared_experts.")
        if is_shared:
            tensors[f"{layer}shared_expert_gate.weight"] = torch.zeros(1, fields["hidden_size"])
            value = 2 * value if "down_proj" in name else value
        tensors[name.replace("shared_experts.", "shared_expert.")] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields))


def vanilla_logits(folder, ids):
    """Logits of transformers' class."""
    import torch
    from transformers import AutoModelForCausalLM

    if "deepseek" in (folder / "config.json").read_text():
        as_qwen2(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same(ranks, plain, tmp_path, case):
    ours = export(ranks, tmp_path, case)
    theirs = plain(vanilla_logits, tmp_path / "vanilla", TOKENS)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=LOGITS)


@pytest.mark.skipif(
    not (LLAMA_CPP and PYTHON),
    reason="MOEPP_LLAMA_CPP (sources) or MOEPP_LLAMA_CPP_PYTHON (environment) names nothing",
)
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(ranks, plain, tmp_path, case):
    from moepp_megatron.data.tokenizer import train_tokenizer

    export(ranks, tmp_path, case)
    tokenizer = train_tokenizer([path.read_text() for path in ROOT.glob("docs/*.md")], 320)
    tokenizer.save(tmp_path / "vanilla/tokenizer.json")
    gguf, texts, answers = (tmp_path / name for name in ("f32.gguf", "texts.json", "answers.json"))
    texts.write_text(json.dumps(TEXTS))
    converter = [ROOT / "examples/to_gguf.py", LLAMA_CPP, tmp_path / "vanilla"]
    reader = [Path(__file__).with_name("llama_cpp_answers.py"), gguf, texts, answers]
    for command in ([*converter, "--outtype", "f32", "--outfile", gguf], reader):
        words = [PYTHON, *map(str, command)]
        succeeded(captured(words, timeout=300, cwd=tmp_path))
    prompts = [tokenizer.encode(text) for text in TEXTS]
    expected = plain(greedy, tmp_path / "moepp", prompts)
    for answer, prompt, wanted in zip(
        json.loads(answers.read_text()), prompts, expected, strict=True
    ):
        assert (answer["prompt"], answer["tokens"]) == (prompt, wanted["tokens"])
        np.testing.assert_allclose(answer["logprobs"], wanted["logprobs"], rtol=0, atol=1e-3)


def test_the_example_says_how_it_is_called():
    file = ROOT / "examples/to_gguf.py"
    done = captured([sys.executable, file])
    assert (done.returncode, "to_gguf.py LLAMA_CPP EXPORT" in done.stderr) == (1, True)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("model", "moe", "named"),
    [
        ({}, {"gating_residual": True}, r"moe\.gating_residual \(true\).*unknown.*llama_cpp\.md"),
        ({}, {"num_constant_experts": 2}, r"num_constant_experts \(2\).*llama_cpp\.md"),
        ({}, {"num_copy_experts": 1}, r"num_copy_experts \(1\) must be 0.*llama_cpp\.md"),
        ({}, {"gate_normalization": "nonzero"}, "'none' or 'selected'"),
        ({}, {"score_function": "sigmoid", "selection_bias": True}, "softmax.*\n.*scores decide"),
        ({}, {"layer_freq": [0, 1]}, r"\(\[0, 1\]\) must be 1 .*no dense layers"),
        ({}, {"shared_expert_ffn_hidden_size": 100}, r"\(100\) must be null or 96"),
        ({}, DIVIDED | {"shared_expert_ffn_hidden_size": 32}, "only models with raw gates"),
        ({"qk_layernorm": True, "kv_channels": 16}, {}, "no such norms.*\n.*must be null or 8"),
    ],
)
def test_what_a_vanilla_moe_cannot_say_is_refused(model, moe, named):
    from moepp_megatron.interop.vanilla import VANILLA

    VANILLA.fields(parse_config(settings(moe=MOE)))
    with config_error(named):
        VANILLA.fields(parse_config(settings(model=model, moe=MOE | moe)))
