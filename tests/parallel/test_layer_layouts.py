"""The layer on expert- and tensor-parallel ranks against reference.py."""

import functools

import numpy as np
import pytest

from tests.parallel.layer_runs import add_up, run_layers, run_reference
from tests.parallel.training_runs import settings

# fp32 sums in another order: a few units in the last place (6e-8) of the largest summand.
RELATIVE = 1e-5

# Ranks, expert-parallel size, tensor-parallel size, expert-tensor-parallel size.
LAYOUTS = [
    (1, 1, 1, 1),
    (2, 2, 1, 1),
    (4, 4, 1, 1),
    (2, 1, 2, 1),
    (2, 2, 2, 1),
    (4, 2, 2, 1),
    (4, 4, 2, 1),
    (2, 1, 2, 2),
    (4, 2, 2, 2),
]
# The layer is the second.
MODEL = {"num_layers": 2}
VARIANTS = {
    "paper": {},
    "released": {"gate_normalization": "nonzero", "expert_input_scale": 2.0},
    "constants": {"constant_init": "zero", "constant_temperature": 0.5},
    "grouped": {"balance_loss": "grouped"},
    "capacity": {"gate_normalization": "selected", "capacity_factor": 1.0},
    "dedup": {"dispatcher": "alltoall_dedup", "router_topk": 4},
    "dedup capacity": {"dispatcher": "alltoall_dedup", "capacity_factor": 1.0},
}


@pytest.fixture(scope="module")
def reference(on_one_rank):
    """Return the results of reference.py for a variant, once for all layouts."""

    @functools.cache
    def computed(variant, data_parallel_size):
        raw = settings(model=MODEL, moe=VARIANTS[variant])
        result = on_one_rank(run_reference, raw, data_parallel_size)
        return result

    return computed


@pytest.fixture(scope="module")
def layers(ranks):
    """Return the results of a layout's ranks, by rank and variant, once for all variants."""

    @functools.cache
    def computed(world, ep, tp, etp):
        parallel = {
            "expert_model_parallel_size": ep,
            "tensor_model_parallel_size": tp,
            "sequence_parallel": tp > 1,
            "expert_tensor_parallel_size": etp,
        }
        variants = {
            name: settings(model=MODEL, moe=moe, parallel=parallel)
            for name, moe in VARIANTS.items()
        }
        return ranks(world).run(run_layers, variants)

    return computed


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("world", "ep", "tp", "etp"), LAYOUTS)
def test_layer_equals_reference(layers, reference, world, ep, tp, etp, variant):
    expected = reference(variant, world // tp)
    layer = add_up([rank[variant] for rank in layers(world, ep, tp, etp)])
    for name in ("output", "logits", "input_grad", "previous_grad"):
        _assert_close(layer[name], expected[name], name)
    assert layer["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert np.abs(gradient).max() > 0, f"{name} has no gradient to compare"
        _assert_close(layer["gradients"][name], gradient, name)


def _assert_close(actual, expected, name):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=RELATIVE * scale, err_msg=name)
