"""One V for all MoE layers (`moe.constants_shared`): gradients, layouts, checkpoints."""

import numpy as np

from tests.parallel.training_runs import short

# fp32 rounds by 6e-8; sums in another order, carried on by steps of Adam (see test_matrix).
FP32 = 1e-5
SHARED = {"num_ffn_experts": 8, "constants_shared": True}
CONSTANTS = "zero_computation.constants"


def shared(**sections):
    """Settings of a run of three layers: one both takes V from the first and hands it on."""
    return short(model={"num_layers": 3}, moe=SHARED, **sections)


def first_layers_vectors(models):
    """Every layer's own V starts from the first layer's."""
    import torch

    (model,) = models
    first = model.decoder.layers[0].mlp.zero_computation
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.mlp.zero_computation.constants.copy_(first.constants)


def test_gradient_is_the_sum_over_layers(trained, alone):
    one_process = alone(shared())
    raw = short(model={"num_layers": 3})
    apart = trained(1, raw, 1, first_layers_vectors)
    own = [name for name in apart.gradients if CONSTANTS in name]
    together = [name for name in one_process.gradients if CONSTANTS in name]
    assert len(own) == 3
    assert together == ["decoder.layers.0.mlp." + CONSTANTS]
    assert one_process.losses[0] == apart.losses[0]
    parts = [apart.gradients.pop(name) for name in own]
    assert all(np.abs(part).max() > 0 for part in parts)
    apart.gradients[together[0]] = np.sum(parts, axis=0, dtype=np.float32)
    assert apart.gradients.keys() == one_process.gradients.keys()
    for name, expected in apart.gradients.items():
        limit = FP32 * np.abs(expected).max()
        np.testing.assert_allclose(
            one_process.gradients[name], expected, rtol=0, atol=limit, err_msg=name
        )
