"""Conversion both ways: names, bits, every gate setting, what is refused."""

import dataclasses
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest

from tests.interop.checkpoints import (
    CASES,
    GOLDEN,
    convert_and_score,
    hf_to_mcore,
    load_tensors,
    mcore_to_hf,
    write_released,
)
from tests.interop.models import build, settings
from tests.interop.transformers_models import load_model
from tests.parallel.training_runs import VANILLA, begin_training
from tests.refusals import config_error

MODELS = {
    "paper": {},
    "two-layer gate, GQA, dense layers, tied": {
        "model": {"num_layers": 4, "num_query_groups": 2, "tie_embeddings": True},
        "moe": {"two_layer_gate": True, "layer_freq": [0, 1, 1, 0]},
    },
    "selection bias, shared expert, norms, head width": {
        "model": {"qk_layernorm": True, "kv_channels": 16},
        "moe": {
            "selection_bias": True,
            "shared_expert_ffn_hidden_size": 24,
            "ffn_hidden_size": 40,
            "num_constant_experts": 0,
        },
    },
    "norms over all heads": {
        "model": {
            "num_query_groups": 2,
            "qk_layernorm": True,
            "qk_layernorm_scope": "all_heads",
            "kv_channels": 16,
        }
    },
    "vanilla": {"moe": VANILLA},
}


def names_of_model(raw):
    """Shapes and objects by checkpoint name: of a real model, and as the rules have them."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from moepp_megatron.config import parse_config
    from moepp_megatron.interop.tensor_rules import linear_modules, moepp_rules
    from moepp_megatron.model.initialize import _sharded_tensors

    (model,) = build(raw)
    real = {}
    for entry in nested_values(model.sharded_state_dict()):
        if isinstance(entry, ShardedObject):
            real[entry.unique_key] = None
        for tensor in _sharded_tensors(entry):
            real[tensor.key] = tuple(tensor.global_shape)
    config = parse_config(raw)
    ours = {r.key: r.shape for r in moepp_rules(config) if not r.unused}
    for module, count in linear_modules(config):
        ours |= {f"{module}._extra_state/shard_{part}_{count}": None for part in range(count)}
    return real, ours


@pytest.mark.parametrize("model", MODELS)
def test_names_are_those_of_the_model(on_one_rank, model):
    real, ours = on_one_rank(names_of_model, settings(**MODELS[model]))
    assert ours == real


def round_trip(source, work, layout):
    hf_to_mcore(source, work / "mcore")
    mcore_to_hf(work / "mcore", work / "hf", layout, max_shard_bytes=100_000)
    return work / "hf"


def assert_same_bits(first, second):
    import torch

    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        same = torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))
        assert same, f"{name} changed"


@pytest.mark.parametrize("layout", ["released", "moepp"])
@pytest.mark.parametrize("case", CASES)
def test_golden_round_trip_is_bitwise(tmp_path, case, layout):
    hf = round_trip(GOLDEN / case, tmp_path, layout)
    assert_same_bits(load_tensors(GOLDEN / case), load_tensors(hf))
    assert len(list(hf.glob("model-*.safetensors"))) > 3
    if layout == "released":
        before = json.loads((GOLDEN / case / "config.json").read_text())
        after = json.loads((hf / "config.json").read_text())
        assert {key: after[key] for key in before} == before


def test_bf16_round_trip_keeps_fp32_gates(tmp_path):
    import torch

    source = write_released(tmp_path / "hf_bf16", "bfloat16", moe_expert_interval=2)
    tensors = load_tensors(source)
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.bfloat16}
    assert_same_bits(tensors, load_tensors(round_trip(source, tmp_path, "released")))


@pytest.mark.parametrize("interval", [1, 2])
def test_released_layout_warns_of_what_the_released_code_cannot_run(tmp_path, interval):
    hf_to_mcore(write_released(tmp_path / "hf", moe_expert_interval=interval), tmp_path / "mcore")
    warnings = mcore_to_hf(tmp_path / "mcore", tmp_path / "back", "released")
    assert len(warnings) == interval - 1, warnings
    for warning in warnings:
        assert "released code cannot run this model: with moe_expert_interval (2)" in warning
    assert mcore_to_hf(tmp_path / "mcore", tmp_path / "ours", "moepp") == []


GATES = {
    "plain": {},
    "two layers": {"moe_2layer_gate": True},
    "mixtral": {"moe_use_mixtral_gating": True},
    "logits norm": {"moe_use_logits_norm": True, "moe_gate_norm_std": 2.5},
    "mixtral, logits norm": {
        "moe_use_mixtral_gating": True,
        "moe_use_logits_norm": True,
        "moe_gate_norm_std": 0.5,
    },
    "input as it is": {"moe_feature_no_mul_topk": True},
    "one key/value head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
}


def released_logits(source, tokens):
    """Return the logits that our modelling file computes from the released format."""
    import torch

    model = load_model(source, released=True)
    with torch.no_grad():
        return model(torch.from_numpy(np.load(tokens)["input_ids"])).logits.numpy()


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_setting(on_one_rank, plain, tmp_path, gate):
    source = write_released(tmp_path / "hf", **GATES[gate])
    tokens = write_tokens(tmp_path)
    scores = on_one_rank(convert_and_score, source, tmp_path / "mcore", tokens, [])
    expected = plain(released_logits, source, tokens)
    np.testing.assert_allclose(scores["logits"], expected, rtol=0, atol=1e-4)


def write_tokens(folder):
    tokens = folder / "tokens.npz"
    np.savez(tokens, input_ids=np.random.default_rng(0).integers(0, 64, (2, 17)))
    return tokens


def break_checkpoint(folder, how):
    """Damage `folder`, a released checkpoint in one file."""
    from safetensors.torch import save_file

    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_tensors(folder)
    name = "model.layers.1.mlp.moe.experts.experts.2.up_proj.weight"
    if how == "missing":
        del tensors[name]
    elif how == "unexpected":
        tensors["model.layers.9.surprise"] = tensors[name].clone()
    elif how == "wrong shape":
        tensors[name] = tensors[name][:-1].clone()
    elif how == "truncated":
        os.truncate(file, file.stat().st_size - 4)
        return
    elif how == "longer":
        file.write_bytes(file.read_bytes() + b"\0" * 8)
        return
    elif how == "header length":
        file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])
        return
    elif how == "header":
        data = file.read_bytes()
        file.write_bytes(data.replace(b'"shape":[64,32]', b'"shape":[64,99]', 1))
        return
    elif how == "no json":
        file.write_bytes((16).to_bytes(8, "little") + b"{" * 16)
        return
    elif how == "rope":
        content = json.loads(config.read_text())
        config.write_text(json.dumps(content | {"rope_scaling": {"type": "linear", "factor": 2.0}}))
    elif how == "model type":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gpt2"}))
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("missing", r"experts\.2\.up_proj\.weight is missing"),
        ("unexpected", r"model\.layers\.9\.surprise is unexpected"),
        ("wrong shape", r"experts\.2\.up_proj\.weight must have shape \[96, 32\] .* \[95, 32\]"),
        ("truncated", r"model\.safetensors must have \d+ bytes by its header and has \d+"),
        ("longer", r"model\.safetensors must have \d+ bytes"),
        ("header length", r"model\.safetensors has \d+ bytes, too few for its header"),
        ("header", r"model\.safetensors gives tensor \S+ 8192 bytes for shape \[64, 99\]"),
        ("no json", r"model\.safetensors has a header that cannot be read"),
        ("rope", r"rope_scaling .* must be null"),
        ("model type", r"model_type \(gpt2\)"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, how, named):
    source = write_released(tmp_path / "hf")
    break_checkpoint(source, how)
    with config_error(named):
        hf_to_mcore(source, tmp_path / "mcore")
    assert not (tmp_path / "mcore").exists()


def test_index_that_contradicts_its_shards_is_refused(tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(GOLDEN / "mixtral_gate", source)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())

    def refuse(changed, match):
        index.write_text(json.dumps(changed))
        with config_error(match):
            hf_to_mcore(source, tmp_path / "mcore")

    names = content["weight_map"]
    refuse({**content, "metadata": {"total_size": 5}}, "total_size")
    refuse({**content, "weight_map": {**names, "extra": min(names.values())}}, "tensor extra")
    refuse({**content, "weight_map": {**names, "lm_head.weight": "../x"}}, "its own folder")
    moved = {**names, "model.norm.weight": min(names.values())}
    assert moved != names
    refuse({**content, "weight_map": moved}, "places tensor model.norm.weight")
    refuse({**content, "weight_map": {**names, "lm_head.weight": "gone"}}, "gone cannot be read")


class Malicious:
    def __reduce__(self):
        return (os.mkdir, (os.environ["MALICIOUS_FOLDER"],))


def test_pickled_weights_need_a_flag_and_run_nothing(tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("MALICIOUS_FOLDER", str(tmp_path / "ran"))
    source = write_released(tmp_path / "hf")
    tensors = load_tensors(source)
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    with config_error(r"pytorch_model\.bin holds pickled weights"):
        hf_to_mcore(source, tmp_path / "mcore")
    hf_to_mcore(source, tmp_path / "mcore", allow_pickle=True)

    torch.save({**tensors, "lm_head.weight": Malicious()}, source / "pytorch_model.bin")
    with config_error("cannot be read as plain weights"):
        hf_to_mcore(source, tmp_path / "other", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_checkpoint_index_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MALICIOUS_FOLDER", str(tmp_path / "ran"))
    hf_to_mcore(write_released(tmp_path / "hf"), tmp_path / "mcore")
    index = tmp_path / "mcore/.metadata"
    good = index.read_bytes()
    index.write_bytes(pickle.dumps(Malicious()))
    with config_error(r"asks for (posix|os)\.mkdir"):
        mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    index.write_bytes(good)
    data = next((tmp_path / "mcore").glob("*.distcp"))
    os.truncate(data, data.stat().st_size - 1)
    with config_error(rf"{data.name} must have at least"):
        mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "back").exists()


def test_a_taken_folder_is_left_alone(tmp_path):
    target = tmp_path / "mcore"
    target.mkdir()
    (target / "mine").write_text("kept")
    with config_error("must not exist or be empty"):
        hf_to_mcore(write_released(tmp_path / "hf"), target)
    assert [path.name for path in target.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("moe", "named"),
    [
        ({"num_constant_experts": 3}, r"moe\.num_constant_experts \(3\)"),
        ({"gate_normalization": "none"}, r"moe\.gate_normalization \('none'\)"),
        ({"constant_temperature": 0.5}, r"moe\.constant_temperature \(0\.5\)"),
        ({"layer_freq": [1, 0]}, r"moe\.layer_freq"),
    ],
)
def test_released_layout_refuses_what_it_cannot_say(moe, named):
    from moepp_megatron.config import parse_config
    from moepp_megatron.interop.hf_config import RELEASED

    released = {"num_ffn_experts": 4, "gate_normalization": "nonzero"}
    RELEASED.fields(parse_config(settings(moe=released)))
    with config_error(named):
        RELEASED.fields(parse_config(settings(moe=released | moe)))


def start_training_from(folder, dtype):
    """Only weights are read, also the optimizer's copies, and training starts at step 0."""
    import torch

    from moepp_megatron.interop.hf_config import config_from_hf
    from moepp_megatron.interop.hf_source import HFSource
    from moepp_megatron.training.checkpoint.read import read_checkpoint

    source = write_released(folder / "hf")
    hf_to_mcore(source, folder / "mcore")
    raw = config_from_hf(HFSource(source).config, "x").model_dump(mode="json")
    raw["precision"]["dtype"] = dtype
    config, _, model = begin_training(raw)
    progress = read_checkpoint(folder / "mcore", model, config)[0]
    assert progress.step == 0
    wanted = load_tensors(source)["model.embed_tokens.weight"].to(
        next(model.models[0].parameters()).dtype
    )
    assert torch.equal(model.models[0].embedding.word_embeddings.weight, wanted)
    # A step with zero gradients writes the optimizer's copies back into the model.
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    for group in model.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    model.optimizer.step()
    assert torch.equal(model.models[0].embedding.word_embeddings.weight, wanted)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_starts_from_converted_weights(ranks, tmp_path, dtype):
    ranks(1).run(start_training_from, tmp_path, dtype)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 200 + b"1" + b"}" * 200,
        b'{"\\ud800": {}}',
        b"1" * 5000,
        b"{%s}" % b",".join(b'"%d":{"shape":[],"data_offsets":[0,0]}' % i for i in range(250_000)),
    ],
    ids=["brackets", "objects", "surrogate", "digits", "tensors"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_hostile_json_is_refused_in_one_line(tmp_path, name, content):
    source = write_released(tmp_path / "hf")
    if name == "model.safetensors":
        content = len(content).to_bytes(8, "little") + content
    (source / name).write_bytes(content)
    with config_error(rf"{name} (must be JSON|has a header that cannot be read)") as caught:
        hf_to_mcore(source, tmp_path / "mcore")
    assert "\n" not in str(caught.value)


def test_a_tensor_that_no_rule_reads_is_not_left_out_silently(tmp_path, monkeypatch):
    """A kind of expert that the exported program does not know would change the model."""
    from moepp_megatron.interop import to_hf
    from moepp_megatron.interop.checkpoint_tensors import TensorReader

    hf_to_mcore(write_released(tmp_path / "hf"), tmp_path / "mcore")
    rules = to_hf._FORMATS["moepp"].rules
    key = next(k for k in TensorReader(tmp_path / "mcore").tensors if "constants" in k)
    forgetful = dataclasses.replace(
        to_hf._FORMATS["moepp"],
        rules=lambda config: (rule for rule in rules(config) if rule.key != key),
    )
    monkeypatch.setitem(to_hf._FORMATS, "moepp", forgetful)
    with config_error(rf"tensor {re.escape(key)} has no place in this layout"):
        to_hf.mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    assert not (tmp_path / "back").exists()
