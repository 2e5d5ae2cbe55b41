"""ZEDA's format, both ways, against its published rule, loaded as it is written."""

import json

import numpy as np
import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.interop.zeda import ZEDA, zeda_config
from tests.interop.checkpoints import convert_and_score, hf_to_mcore, load_tensors, mcore_to_hf
from tests.interop.models import settings
from tests.interop.test_export import LOGITS, TOKENS, save_and_compute
from tests.refusals import config_error

QWEN = {
    "model": {"qk_layernorm": True, "num_query_groups": 2, "rotary_base": 5e4},
    "moe": {
        "gating_residual": False,
        "num_constant_experts": 0,
        "num_copy_experts": 0,
        "num_zero_experts": 3,
        "router_topk": 3,
        "gate_normalization": "selected",
    },
}
MIXED = {"num_constant_experts": 2, "num_copy_experts": 1, "num_zero_experts": 2}
CASES = {
    "Qwen3": QWEN,
    "Qwen3, all kinds, a dense layer": {
        "model": QWEN["model"],
        "moe": QWEN["moe"] | MIXED | {"layer_freq": [1, 0], "gate_normalization": "none"},
    },
}

# What of Qwen3-30B-A3B's config.json decides, and what ZEDA's recipe adds.
PUBLISHED = {
    "architectures": ["Qwen3MoePlusPlusForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
    "use_zce_mask": False,
    "zce_nums": [64],
    "zce_types": ["zero"],
}


def reader_logits(folder, ids):
    """Logits of the published rule on a folder as it is written."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.interop import zeda_reader

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    assert type(model) is getattr(zeda_reader, architecture)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)).logits.numpy()


def save_with_reader(source, target, ids):
    """Write a folder by the published class, the way that transformers does, in another seed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.interop import zeda_reader

    assert zeda_reader.PlusPlusBlock
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.2)
        model.save_pretrained(target)
        return model(torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_both_ways(on_one_rank, plain, tmp_path, case):
    from moepp_megatron.interop.checkpoint_tensors import TensorReader

    raw = settings(**CASES[case])
    ours = on_one_rank(save_and_compute, raw, tmp_path / "run")
    mcore_to_hf(tmp_path / "run", tmp_path / "hf", "zeda")
    theirs = plain(reader_logits, tmp_path / "hf", TOKENS)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=LOGITS)

    hf_to_mcore(tmp_path / "hf", tmp_path / "back")
    (saved,) = (tmp_path / "run").glob("step_*")
    first, second = TensorReader(saved), TensorReader(tmp_path / "back")
    names = [name for name in first.tensors if not name.startswith("optimizer")]
    assert sorted(names) == sorted(second.tensors)
    for name in names:
        assert first.read(name, None).equal(second.read(name, None)), name
    mcore_to_hf(tmp_path / "back", tmp_path / "again", "zeda")
    one, other = load_tensors(tmp_path / "hf"), load_tensors(tmp_path / "again")
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    (text, again) = (
        json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "again")
    )
    assert text == again


def test_a_model_of_the_published_class_comes_in(on_one_rank, plain, tmp_path):
    (tmp_path / "config").mkdir()
    fields = ZEDA.fields(parse_config(settings(**CASES["Qwen3, all kinds, a dense layer"])))
    (tmp_path / "config/config.json").write_text(json.dumps(fields))
    theirs = plain(save_with_reader, tmp_path / "config", tmp_path / "theirs", TOKENS)
    folders = (tmp_path / "theirs", tmp_path / "ours")
    scores = on_one_rank(convert_and_score, *folders, TOKENS, [])
    np.testing.assert_allclose(scores["logits"], theirs, rtol=0, atol=LOGITS)


def test_published_configuration_comes_back():
    written = ZEDA.fields(zeda_config(PUBLISHED, "theirs"))
    # ZEDA's recipe leaves the base model's type.
    known = PUBLISHED.keys() - {"model_type"}
    assert {key: written.get(key) for key in known} == {key: PUBLISHED[key] for key in known}


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("moe", {"gating_residual": True}, "gating residuals are unknown there"),
        ("moe", {"gate_normalization": "nonzero"}, "zero experts count in the sum"),
        ("moe", {"two_layer_gate": True}, "it is unknown there"),
        ("model", {"qk_layernorm_scope": "all_heads"}, r"\('all_heads'\) must be 'head'"),
        ("model", {"qk_layernorm": False}, r"\(false\) must be true for --layout zeda"),
    ],
)
def test_what_zeda_cannot_say_is_refused(section, change, named):
    ZEDA.fields(parse_config(settings(**QWEN)))
    changed = QWEN | {section: QWEN[section] | change}
    with config_error(named):
        ZEDA.fields(parse_config(settings(**changed)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        # The published classes mask where the field is missing.
        ({"use_zce_mask": None}, r"use_zce_mask \(null\) must be false: with it, or without"),
        ({"use_zce_mask": True}, r"use_zce_mask \(true\) must be false"),
        ({"zce_types": ["zero", "copy"], "zce_nums": [1, 2]}, "in this order"),
        ({"zce_types": ["identity"]}, "must be some of constant, copy, zero"),
        ({"zce_nums": [3, 1]}, r"one of zce_nums \(\[3, 1\]\) for each"),
        ({"zce_nums": 3}, r"one of zce_nums \(3\) for each"),
        ({"model_type": "glm4_moe_lite"}, r"\(glm4_moe_lite\) must be qwen3_moe or qwen3_moe_plus"),
    ],
)
def test_what_cannot_come_in_is_refused(change, named):
    fields = ZEDA.fields(parse_config(settings(**QWEN)))
    zeda_config(fields, "theirs")
    with config_error(named):
        zeda_config(fields | change, "theirs")


def test_readers_that_differ_are_named():
    assert not list(ZEDA.warnings(parse_config(settings(**QWEN))))
    kinds, dense = ZEDA.warnings(
        parse_config(settings(**QWEN | {"moe": QWEN["moe"] | MIXED | {"layer_freq": [1, 0]}}))
    )
    assert "num_constant_experts (2), moe.num_copy_experts (1), moe.num_zero" in kinds
    assert "either copy or zero experts" in kinds
    assert "layer_freq ([1, 0])" in dense
