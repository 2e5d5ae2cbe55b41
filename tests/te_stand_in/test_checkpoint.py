"""Checkpoints of FP8 runs: weights for any precision, and what delayed scaling remembers."""

import os
import pickle

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from moepp_megatron.training.checkpoint.data_only import load_data, unsafe_pickle
from moepp_megatron.training.checkpoint.state import (
    _checked_fp8_state,
    apply_model_state,
    apply_state,
    model_state,
    saved_state,
    state_to_load,
)
from moepp_megatron.training.setup import build_training_model
from tests.refusals import config_error
from tests.te_stand_in.models import config_of, losses, model_of


def histories(model):
    return {
        name: module.fp8_meta["amax_history_fwd"]
        for name, module in model.named_modules()
        if "amax_history_fwd" in getattr(module, "fp8_meta", {})
    }


def save_and_load(path, saved, loaded):
    """All of a checkpoint, as a run writes and reads it."""
    dist_checkpointing.save(saved_state(saved), str(path))
    assert unsafe_pickle(path) is None
    apply_state(loaded, load_data(state_to_load(loaded), path))


def read_weights(path, model):
    apply_model_state([model], load_data(model_state([model]), path))


@pytest.fixture
def trained(monkeypatch):
    """Builds a model with its optimizer and trains it for a step or more."""
    # One rank has nothing to gather, and gloo's coalesced gather would mix up FP8 and bf16 buckets.
    monkeypatch.setattr(_ParamAndGradBucketGroup, "start_param_sync", lambda *args, **kwargs: None)

    def build(config, steps=1):
        model = build_training_model(config)
        for _ in range(steps):
            step(model)
        return model

    return build


def step(model):
    (chunk,) = model.chunks
    loss = losses(chunk).sum()
    chunk.zero_grad_buffer()
    loss.backward()
    chunk.finish_grad_sync()
    model.scheduler.step(increment=1)
    model.optimizer.step()
    return loss.detach()


BF16_MOMENTS = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
REMAINDERS = {"store_param_remainders": True}


@pytest.mark.parametrize(
    ("recipe", "fp8_param", "optimizer"),
    [
        ("delayed", False, {}),
        ("delayed", True, {}),
        ("blockwise", True, {}),
        (None, False, {"exp_avg_dtype": "bf16"}),
        (None, False, BF16_MOMENTS | REMAINDERS),
        ("blockwise", True, BF16_MOMENTS),
    ],
)
def test_training_continues_as_if_it_had_not_stopped(
    tmp_path, trained, recipe, fp8_param, optimizer
):
    config = config_of(recipe, precision={"fp8_param": fp8_param}, optimizer=optimizer)
    first, second = trained(config, steps=2), trained(config, steps=0)
    save_and_load(tmp_path, first, second)
    for _ in range(2):
        assert torch.equal(step(second), step(first))
    for (name, actual), expected in zip(
        second.models[0].named_parameters(), first.models[0].parameters(), strict=True
    ):
        assert torch.equal(actual * 1.0, expected * 1.0), name


def test_the_history_of_delayed_scaling_comes_back(tmp_path, trained):
    config = config_of("delayed", precision={"fp8_amax_history_len": 4})
    first, second = trained(config), trained(config, steps=0)
    assert histories(second.models[0]) == {}
    save_and_load(tmp_path, first, second)
    expected, found = (histories(model.models[0]) for model in (first, second))
    assert found.keys() == expected.keys()
    assert len(found) == 4 * (2 + 2)
    for name, history in found.items():
        assert history.shape[0] == 4
        assert history[0, 0] > 0
        assert torch.equal(history, expected[name]), name
    assert "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE" not in os.environ


@pytest.mark.parametrize(("recipe", "fp8_param"), [("delayed", False), ("tensorwise", True)])
def test_weights_are_read_in_any_precision(tmp_path, trained, recipe, fp8_param):
    """As `moepp generate` reads the checkpoint of an FP8 run, in bf16."""
    first = trained(config_of(recipe, precision={"fp8_param": fp8_param}))
    dist_checkpointing.save(saved_state(first), str(tmp_path))
    second = model_of(config_of(None))
    read_weights(tmp_path, second)
    plain = dict(first.models[0].named_parameters())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, plain[name] * 1.0), name
    assert losses(second).isfinite().all()


def crafted(content):
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)


class _RunsCode:
    def __reduce__(self):
        return os.system, ("true",)


class _HidesCode:
    """A tensor whose own bytes are a pickle, as torch stores them."""

    def __reduce__(self):
        return torch.storage._load_from_bytes, (pickle.dumps(_RunsCode()),)


def changes_a_class():
    """Return FP8 state that, read twice, would change a class: BUILD sets its attribute."""
    recipe = b"X\x20\x00\x00\x00transformer_engine.common.recipeX\x06\x00\x00\x00Format\x93"
    state = b"N}X\x04\x00\x00\x00madeK\x01s\x86"
    return torch.frombuffer(bytearray(b"\x80\x04" + recipe + state + b"b."), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (crafted(_RunsCode()), "system"),
        (crafted({"scale_fwd": _HidesCode()}), "Weights only load failed"),
        (crafted({"a": 1})[:5], "cannot be read"),
        (changes_a_class(), "changes what it did not make"),
        (b"bytes", "a bytes, not bytes in a tensor"),
    ],
    ids=["code", "code in a tensor", "cut", "changes a class", "no tensor"],
)
def test_anything_but_a_history_is_refused(value, found):
    state = {"decoder.layers.0.mlp.experts.linear_fc1._extra_state": value}
    with config_error(found) as caught, _checked_fp8_state(state):
        pytest.fail("nothing may be read")
    message = str(caught.value)
    assert "_extra_state must hold the history of delayed FP8 scaling" in message
    assert message.endswith("; load another checkpoint")


def test_without_a_history_nothing_is_allowed():
    with _checked_fp8_state({"linear._extra_state": torch.empty(0, dtype=torch.uint8)}):
        assert "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE" not in os.environ
