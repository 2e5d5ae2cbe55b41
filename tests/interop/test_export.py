"""transformers computes from exported folders the numbers that we compute."""

import numpy as np
import pytest

from moepp_megatron.config import parse_config
from tests.interop.checkpoints import CASES, GOLDEN, hf_to_mcore, mcore_to_hf
from tests.interop.models import build, settings
from tests.interop.transformers_models import load_model
from tests.parallel.checkpoint_runs import save_checkpoint
from tests.refusals import config_error

# The issue's tolerance between our logits and transformers'.
LOGITS = 1e-4

PLAIN_MOE = {"num_constant_experts": 0, "gating_residual": False}
MODELS = {
    "paper": {"moe": {"num_constant_experts": 3}},
    "everything else": {
        "model": {"num_query_groups": 2, "qk_layernorm": True, "kv_channels": 16, "num_layers": 3},
        "moe": {
            "layer_freq": [1, 0, 1],
            "score_function": "sqrtsoftplus",
            "gate_normalization": "selected",
            "two_layer_gate": True,
            "selection_bias": True,
            "gate_scale": 1.5,
            "expert_input_scale": 2.0,
            "constant_temperature": 0.5,
            "logits_norm_std": 1.5,
            "shared_expert_ffn_hidden_size": 24,
            "shared_expert_gate": True,
            "ffn_hidden_size": 40,
        },
    },
    "groups": {
        "moe": {
            "num_ffn_experts": 8,
            "num_groups": 4,
            "group_topk": 2,
            "router_topk": 4,
            "score_function": "sigmoid",
            "selection_bias": True,
        }
    },
    "groups without a bias": {"moe": {"num_ffn_experts": 8, "num_groups": 4, "group_topk": 1}},
    "biases": {"model": {"qkv_bias": True, "num_query_groups": 2}},
    "norms over all heads": {
        "model": {
            "num_query_groups": 2,
            "qk_layernorm": True,
            "qk_layernorm_scope": "all_heads",
            "kv_channels": 16,
        }
    },
    "shared constants": {"moe": {"constants_shared": True}},
    "vanilla, tied": {
        "model": {"tie_embeddings": True},
        "moe": PLAIN_MOE | {"num_zero_experts": 0, "num_copy_experts": 0},
    },
    "vanilla with a bias": {
        "moe": PLAIN_MOE
        | {"num_zero_experts": 0, "num_copy_experts": 0, "score_function": "sigmoid"}
        | {"selection_bias": True, "bias_update_rate": 0.001, "gate_scale": 2.5}
        | {"num_ffn_experts": 8, "num_groups": 4, "group_topk": 2, "router_topk": 4}
    },
}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 16))


def save_and_compute(raw, folder):
    """Save a random model as training does; returns its logits."""
    import torch

    from moepp_megatron.config import parse_config
    from moepp_megatron.training.setup import build_training_model

    build(raw)
    config = parse_config(raw)
    model = build_training_model(config)
    # The optimizer has no state to save before its first step.
    for wrapped in model.chunks:
        wrapped.zero_grad_buffer()
    model.optimizer.step()
    chunk = model.models[0].eval()
    for name, buffer in chunk.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.linspace(0.2, -0.2, len(buffer)))
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if "norm" in name:
                parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
            if name.endswith(".bias"):
                parameter.copy_(torch.randn_like(parameter))
        ids = torch.from_numpy(TOKENS)
        logits = chunk(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    save_model(folder, model, config)
    return logits.numpy()


def save_model(folder, model, config):
    """Save a model, of step 3, with a tokenizer."""
    import multiprocessing

    from moepp_megatron.training.checkpoint.files import Progress

    tokenizer = folder.parent / "tokenizer.json"
    write_tokenizer(tokenizer)
    # megatron-core hands results over through a process of its own, which daemons may not start.
    multiprocessing.current_process()._config["daemon"] = False
    save_checkpoint(folder, model, Progress(step=3), config, tokenizer)


def write_tokenizer(path):
    from tokenizers import Tokenizer, models

    vocabulary = {"<|endoftext|>": 5} | {chr(97 + i): i for i in range(5)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(path))


def hf_logits(folder, ids, layout):
    """Logits through AutoModelForCausalLM, and whether the key/value cache changes greedy text."""
    import torch
    from transformers import AutoTokenizer

    model = load_model(folder)
    expected = "MoeForCausalLM" if layout == "released" else "MoEPPForCausalLM"
    assert type(model).__name__ == expected
    if (folder / "tokenizer.json").exists():
        assert AutoTokenizer.from_pretrained(folder).eos_token_id == 5 == model.config.eos_token_id
    tokens = torch.from_numpy(ids)
    texts = [
        model.generate(tokens[:1, :8], max_new_tokens=8, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)
    with torch.no_grad():
        return model(tokens).logits.numpy()


@pytest.mark.parametrize("name", MODELS)
def test_trained_models_in_transformers(on_one_rank, plain, tmp_path, name):
    raw = settings(**MODELS[name])
    ours = on_one_rank(save_and_compute, raw, tmp_path / "checkpoints")
    assert mcore_to_hf(tmp_path / "checkpoints", tmp_path / "hf") == []
    theirs = plain(hf_logits, tmp_path / "hf", TOKENS, "moepp")
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=LOGITS)


def test_layers_of_multi_token_prediction_are_left_out(on_one_rank, plain, tmp_path):
    raw = settings(model={"mtp_num_layers": 1})
    ours = on_one_rank(save_and_compute, raw, tmp_path / "checkpoints")
    warnings = mcore_to_hf(tmp_path / "checkpoints", tmp_path / "hf")
    assert warnings == ["model.mtp_num_layers (1): the export leaves these layers out"]
    theirs = plain(hf_logits, tmp_path / "hf", TOKENS, "moepp")
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("layout", ["moepp", "released"])
@pytest.mark.parametrize("case", CASES)
def test_golden_in_transformers(plain, tmp_path, case, layout):
    hf_to_mcore(GOLDEN / case, tmp_path / "mcore")
    mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", layout)
    expected = np.load(GOLDEN / case / "expected.npz")
    logits = plain(hf_logits, tmp_path / "hf", expected["input_ids"], layout)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("layout", ["moepp", "released", "zeda", "vanilla"])
def test_latent_attention_is_refused(tmp_path, monkeypatch, layout):
    from moepp_megatron.interop import to_hf
    from moepp_megatron.training.checkpoint import find

    latent = {"kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}
    config = parse_config(settings(model={"latent_attention": latent}))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    for module in (find, to_hf):
        monkeypatch.setattr(module, "find_checkpoint", lambda source: source)
    with config_error("must be null for an export: no layout has it; sc"):
        to_hf.mcore_to_hf(tmp_path, tmp_path / "export", layout)
    assert not (tmp_path / "export").exists()
