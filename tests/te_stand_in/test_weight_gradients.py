"""Transformer Engine's layers add weight gradients to the reduced buffers inside the product."""

import pytest

from moepp_megatron.training.setup import build_training_model
from tests.parallel.training_runs import SELECTIVE
from tests.te_stand_in.models import config_of, losses

STEPS, MICRO_BATCHES = 2, 3


def gradients(config, fuses):
    """Sums over micro-batches of the second step, and the parameters that were added to inside."""
    training = build_training_model(config)
    (chunk,), (model,) = training.chunks, training.models
    layers = [m for m in model.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    # Attention's two and the experts' two of four layers.
    assert len(layers) == 16
    assert all(layer.fuse_wgrad_accumulation for layer in layers)
    for layer in layers:
        layer.fuse_wgrad_accumulation = fuses
    for _ in range(STEPS):
        chunk.zero_grad_buffer()
        # As megatron-core's schedules do before the first micro-batch.
        model.set_is_first_microbatch()
        for seed in range(MICRO_BATCHES):
            losses(chunk, seed).sum().backward()
    named = dict(model.named_parameters())
    inside = {name for name, p in named.items() if p.grad_added_to_main_grad}
    return {name: p.main_grad.clone() for name, p in named.items()}, inside


@pytest.mark.parametrize("recipe", [None, "blockwise"])
def test_sums_over_micro_batches(recipe):
    training = SELECTIVE
    config = config_of(recipe, training=training)
    plain, none = gradients(config, fuses=False)
    fused, inside = gradients(config, fuses=True)
    assert none == set()
    kinds = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
    assert inside == {name for name in plain if any(kind in name for kind in kinds)}
    assert "output_layer.weight" in plain
    for name, expected in plain.items():
        # The product of a micro-batch is rounded to bf16 before it is added, or it is not.
        bound = 2**-8 * expected.abs().max() if name in inside else 0.0
        assert (fused[name] - expected).abs().max() <= bound, name
        assert fused[name].abs().max() > 0, name
