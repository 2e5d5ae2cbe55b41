"""Weights in FP8 only: which they are, where they start, and how a step changes them."""

import pytest
import torch
from transformer_engine.pytorch.tensor import Float8BlockwiseQTensor, Float8Tensor, QuantizedTensor

from tests.te_stand_in.models import RECIPES, config_of, losses, model_of
from tests.te_stand_in.test_checkpoint import step, trained  # noqa: F401

IN_FP8 = {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}


def fp8_names(model):
    return {name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_gemm_weights_alone_are_in_fp8(recipe):
    config = config_of(recipe, precision={"fp8_param": True})
    model = model_of(config)
    expected = {
        name
        for name, _ in model.named_parameters()
        if set(name.split(".")) & IN_FP8 and "layer_norm" not in name
    }
    assert fp8_names(model) == expected
    assert len(expected) == 4 * (2 + 2 * 4), "two of attention, two of each expert"
    kind = Float8BlockwiseQTensor if recipe == "blockwise" else Float8Tensor
    assert {type(dict(model.named_parameters())[name].data) for name in expected} == {kind}
    assert not any("router" in name or "zero_computation" in name for name in expected)


def test_layers_at_the_ends_keep_plain_weights():
    precision = {"fp8_param": True, "first_last_layers_bf16": True}
    names = fp8_names(model_of(config_of("blockwise", precision=precision)))
    assert {name.split(".")[2] for name in names} == {"1", "2"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_starts_from_exact_copies_and_writes_fp8(
    recipe,
    trained,  # noqa: F811
):
    config = config_of(recipe, precision={"fp8_param": True})
    plain = dict(model_of(config_of(recipe)).named_parameters())
    training = trained(config, steps=0)
    (chunk,), (model,) = training.chunks, training.models
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    for name, weight in weights.items():
        master = weight.main_param.view(weight.shape)
        assert torch.equal(master, plain[name].float()), name
        assert not hasattr(weight, "_high_precision_init_val"), "no second copy is kept"
    # Which of its two ways the optimizer takes to cut FP8 weights.
    assert training.optimizer.chained_optimizers[0].config.fp8_recipe == recipe
    before = {name: weight.dequantize() for name, weight in weights.items()}
    first = step(training)
    for name, weight in weights.items():
        master = weight.main_param.view(weight.shape)
        assert not torch.equal(weight.dequantize(), before[name]), name
        # e4m3 has 3 bits behind the point, so rounding moves a value by up to 2^-4 of itself; the
        # comparison is in bf16, which adds 2^-9.
        error = (weight.dequantize().float() - master).abs().max()
        assert error <= (2**-4 + 2**-9) * master.abs().max(), name
    assert losses(chunk).sum() < first
