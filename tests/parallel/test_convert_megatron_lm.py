"""Checkpoints of Megatron-LM's own loop become ours, and the way back."""

import io
import json
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moepp_megatron.config import load_config
from moepp_megatron.config import megatron_flags as flags
from moepp_megatron.config.reference import section_references
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.interop.checkpoint_tensors import ConvertedCheckpointWriter, TensorReader
from moepp_megatron.interop.from_megatron_lm import (
    _config_from_arguments,
    _find_megatron_checkpoint,
    _read_arguments,
    from_megatron_lm,
)
from moepp_megatron.interop.to_hf import mcore_to_hf
from moepp_megatron.interop.to_megatron_lm import (
    ARGUMENTS_FILE,
    _megatron_arguments,
    to_megatron_lm,
)
from moepp_megatron.training.checkpoint.files import damage
from tests.commands import moepp, succeeded
from tests.interop.checkpoints import score
from tests.parallel.megatron_lm_runs import (
    ARGUMENTS,
    MODEL_ARGUMENTS,
    RUN_ARGUMENTS,
    STEPS,
    scores_in_megatron_lm,
)
from tests.parallel.test_inspect_command import trace
from tests.refusals import config_error

pytestmark = pytest.mark.parallel

# As many experts as `training_runs.settings` has.
OWN = (
    "--moepp-tau 0.5 --moepp-num-zero-experts 2 --moepp-num-copy-experts 0 "
    "--moepp-gate-normalization nonzero"
)
# fp32 log-probabilities of the same weights, other sums of a few hundred terms.
TOLERANCE = 1e-5


def input_ids():
    return np.random.default_rng(0).integers(0, 60, (2, 16))


def vocabulary(corpus):
    return f"--vocab-size {Tokenizer.load(corpus / 'tokenizer.json').vocab_size}"


@pytest.fixture(scope="module")
def saved(ranks, corpus, tmp_path_factory):
    """A `--save` folder of Megatron's loop, and the scores of the model that it ended with."""
    folder = tmp_path_factory.mktemp("megatron-lm")
    arguments = (
        f"{ARGUMENTS} {vocabulary(corpus)} --expert-model-parallel-size 2 {OWN} "
        f"--save {folder / 'save'} --save-interval {STEPS // 2}"
    )
    first, *_ = ranks(2).run(scores_in_megatron_lm, arguments, str(folder / "log"), input_ids())
    return folder / "save", first


@pytest.fixture(scope="module")
def converted(saved, corpus):
    target = saved[0].parent / "ours"
    from_megatron_lm(saved[0], target, tokenizer=corpus / "tokenizer.json")
    return target


def scores_of(ranks, checkpoint, tmp_path):
    tokens = tmp_path / "tokens.npz"
    np.savez(tokens, input_ids=input_ids())
    (scores,) = ranks(1).run(score, checkpoint, tokens, [])
    return scores["token_logprobs"]


def test_the_converted_model_scores_as_megatrons(ranks, saved, converted, tmp_path):
    assert damage(converted) is None
    ours = scores_of(ranks, converted, tmp_path)
    assert np.abs(ours - saved[1]).max() <= TOLERANCE * np.abs(saved[1]).max()
    moe = load_config(converted / "config.yaml").moe
    assert (moe.tau, moe.num_zero_experts, moe.gate_normalization) == (0.5, 2, "nonzero")


def test_weights_are_not_copied(saved, converted):
    source = saved[0] / f"iter_{STEPS:07d}"
    for file in source.glob("*.distcp"):
        assert (converted / file.name).samefile(file)
    weights = ("embedding.", "decoder.", "output_layer.")
    theirs = {name for name in TensorReader(source).tensors if name.startswith(weights)}
    assert set(TensorReader(converted).tensors) == theirs
    # Nothing of what the other loop pickled is in the index.
    assert b"rng_state" not in (converted / ".metadata").read_bytes()
    stored = io.BytesIO(TensorReader(converted).read_bytes("common_state"))
    assert torch.load(stored, weights_only=True) == [{}]


def test_without_hard_links_files_are_copied(saved, tmp_path, monkeypatch):
    def no_links(*paths):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr("os.link", no_links)
    from_megatron_lm(saved[0] / f"iter_{STEPS // 2:07d}", tmp_path / "ours")
    assert damage(tmp_path / "ours") is None
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "ours").iterdir())


def test_it_generates_inspects_and_exports(on_one_rank, converted, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Document 7: words 49 and lines.\n")
    traced = on_one_rank(trace, converted, text, [])
    assert np.isfinite(traced["losses"]).any()
    mcore_to_hf(converted, tmp_path / "hf", "moepp")
    assert json.loads((tmp_path / "hf/config.json").read_text())["num_zero_experts"] == 2
    made = succeeded(moepp("generate", converted, "--prompt", "Doc", "--max-new-tokens", 4))
    assert made.stdout.startswith("Doc")


def test_the_way_back(ranks, saved, converted, corpus, tmp_path):
    """Megatron's loop, with the converted model's arguments, starts from the same weights."""
    arguments = to_megatron_lm(converted, tmp_path / "release")
    assert (tmp_path / "release" / ARGUMENTS_FILE).read_text() == f"{arguments}\n"
    command = (
        f"{RUN_ARGUMENTS} {vocabulary(corpus)} {arguments} --tensor-model-parallel-size 2 "
        f"--sequence-parallel --load {tmp_path / 'release'} --lr 0 --train-iters 1"
    )
    first, *_ = ranks(2).run(scores_in_megatron_lm, command, str(tmp_path / "log"), input_ids())
    assert np.abs(first - saved[1]).max() <= TOLERANCE * np.abs(saved[1]).max()


# ---- what is read of the arguments -----------------------------------------------------------


def read_arguments(saved):
    return _read_arguments(TensorReader(_find_megatron_checkpoint(saved[0])))


def test_settings_of_the_environment_are_kept(ranks, saved, monkeypatch):
    arguments = read_arguments(saved)
    expected = _config_from_arguments(arguments, None, "save")
    for name in [name for name in vars(arguments) if name.startswith("moepp_")]:
        delattr(arguments, name)
    with config_error(r"--moepp-args \(absent\) must give the run"):
        _config_from_arguments(arguments, None, "save")
    assert _config_from_arguments(arguments, OWN, "save") == expected
    arguments.moepp_environment = OWN
    assert _config_from_arguments(arguments, None, "save") == expected


# Defaults that `from_megatron` has in code: of latent attention and of routing.
_IN_CODE = {"kv_lora_rank", "rope_type", "rotary_scaling_factor", "bias_update_rate"}
# A default that changes nothing in what is computed.
_FREE = {"num_workers"}


def test_absent_arguments_have_megatrons_defaults(ranks):
    """Held to the parser of megatron-core's wheel: a new default shows here."""
    defaults = ranks(1).run(_megatrons_defaults)[0]
    ours = {one.name: one.default for section in section_references() for one in section.settings}
    absent = flags.ABSENT | {k: v for _, _, more in flags.ABSENT_WITH for k, v in more.items()}
    other = {}
    for name, key in flags.SETTINGS.items():
        theirs, own = defaults.get(name), absent.get(key, ours[key])
        own = own if isinstance(own, str) else str(own)
        same_number = _number(theirs) is not None and _number(theirs) == _number(own)
        is_same = theirs is None or same_number or str(theirs) == own.strip("'")
        if not is_same and key.rpartition(".")[2] not in _IN_CODE | _FREE:
            other[name] = (theirs, own)
    # Without --group-query-attention the number of groups is not read.
    assert other == {"num-query-groups": (1, "null")}


def _number(value):
    try:
        return float(str(value))
    except ValueError:
        return None


def _megatrons_defaults():
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    options = {name: action for action in parser._actions for name in action.option_strings}
    names = {name: options.get(f"--{name}") for name in flags.SETTINGS}
    return {name: action.default for name, action in names.items() if action is not None}


def test_groups_of_experts_go_both_ways(saved):
    arguments = read_arguments(saved)
    arguments.moe_router_num_groups, arguments.moe_router_group_topk = 4, 2
    config = _config_from_arguments(arguments, None, "save")
    assert (config.moe.num_groups, config.moe.group_topk) == (4, 2)
    words = _megatron_arguments(config)
    for option, value in (("num-groups", "4"), ("group-topk", "2")):
        assert words[words.index(f"--moe-router-{option}") + 1] == value
    # Without group_topk, megatron-core's router does not look at the groups.
    arguments.moe_router_group_topk = None
    assert not _config_from_arguments(arguments, None, "save").moe.limits_groups


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type .* be rope"),
        ({"add_bias_linear": True}, r"biases \(--disable-bias-linear\) \(True\) .* be False"),
        ({"moe_router_force_load_balancing": True}, "force_load_balancing .* is not supported"),
        ({"moe_router_num_groups": 3, "moe_router_group_topk": 1}, "num_groups"),
        ({"num_layers": 5}, "layers.4.* is missing"),
        ({"num_layers": 3}, "layers.3.* is unexpected"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"moepp_num_copy_experts": 2}, r"must have shape \[14, .*\] by the arguments"),
        ({"moe_router_topk": None}, "arguments do not fit"),
    ],
)
def test_a_model_that_is_not_this_one_is_refused(saved, tmp_path, monkeypatch, changes, message):
    arguments = read_arguments(saved)
    vars(arguments).update(changes)
    monkeypatch.setattr(
        "moepp_megatron.interop.from_megatron_lm._read_arguments", lambda reader: arguments
    )
    with config_error(message):
        from_megatron_lm(saved[0], tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []


def test_no_code_of_the_checkpoint_runs(saved, tmp_path):
    """Nothing that the arguments name is imported or called."""
    ran = tmp_path / "ran"

    class Planted:
        def __reduce__(self):
            return eval, (f"open({str(ran)!r}, 'w').close()",)

    folder = tmp_path / "crafted"
    folder.mkdir()
    writer = ConvertedCheckpointWriter(folder)
    import argparse

    arguments = argparse.Namespace(num_layers=4, planted=Planted(), words=[1, Planted()])
    writer.add_object("common_state", {"args": arguments, "other": Planted()})
    writer.finish()
    read = _read_arguments(TensorReader(folder))
    assert vars(read) == {"num_layers": 4}
    assert not ran.exists()
    pickle.loads(pickle.dumps(Planted()))
    assert ran.exists(), "what was planted does nothing"


@pytest.mark.parametrize(
    "common", [b"", b"no zip", pickle.dumps({"args": 1})], ids=["empty", "no zip", "no torch"]
)
def test_arguments_that_cannot_be_read_are_an_error(saved, tmp_path, common):
    folder = tmp_path / f"iter_{STEPS:07d}"
    shutil.copytree(saved[0] / folder.name, folder)
    (folder / "common.pt").write_bytes(common)
    with config_error("must hold the arguments of the run that wrote it"):
        from_megatron_lm(folder, tmp_path / "ours")


def test_what_is_no_checkpoint_of_megatrons_is_refused(tmp_path):
    with config_error(r"must be a checkpoint of Megatron-LM in the format"):
        from_megatron_lm(tmp_path, tmp_path / "ours")


def test_the_target_is_not_overwritten(saved, tmp_path):
    (tmp_path / "mine").write_text("kept")
    with config_error("must not exist or be empty"):
        from_megatron_lm(saved[0], tmp_path)
    assert (tmp_path / "mine").read_text() == "kept"


def test_a_tokenizer_that_does_not_fit_is_refused(saved, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "load", lambda path: SimpleNamespace(vocab_size=100_000))
    with config_error(r"--tokenizer \(.*must fit .* and has 100000"):
        from_megatron_lm(saved[0], tmp_path / "ours", tokenizer=corpus / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "gates"), [(True, "none"), (False, "selected")])
def test_gates_of_megatrons_own_layer_go_both_ways(saved, given, gates):
    arguments = read_arguments(saved)
    changes = {
        "moepp_num_zero_experts": 0,
        "moepp_num_copy_experts": 0,
        "moepp_num_constant_experts": 0,
        "moepp_gating_residual": False,
        "moepp_gate_normalization": "none",
        "moe_router_pre_softmax": given,
    }
    vars(arguments).update(changes)
    config = _config_from_arguments(arguments, None, "save")
    assert (config.moe.is_vanilla, config.moe.gate_normalization) == (True, gates)
    assert ("--moe-router-pre-softmax" in _megatron_arguments(config)) == given


def test_norms_over_all_heads_are_refused(converted):
    both = ["model.qk_layernorm=true", "model.qk_layernorm_scope=all_heads"]
    with config_error(r"qk_layernorm_scope \('all_heads'\) must be 'head' for"):
        _megatron_arguments(load_config(converted / "config.yaml", both))


def test_model_arguments_are_those_that_the_model_was_made_with(converted):
    """Every argument of these tests' models comes back with its value, others beside."""
    words = _megatron_arguments(load_config(converted / "config.yaml"))
    made = dict(zip(words, [*words[1:], ""], strict=True))
    given = MODEL_ARGUMENTS.split()
    for option, value in zip(given, [*given[1:], ""], strict=True):
        if not option.startswith("--"):
            continue
        assert option in made, option
        if value[:1].isdigit():
            assert float(made[option]) == float(value), option
