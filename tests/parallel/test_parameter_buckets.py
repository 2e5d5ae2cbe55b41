"""Parameters that are gathered in many small buckets while the forward pass begins to use them."""

from functools import partial

import pytest

from tests.parallel.training_runs import EP2, compare, short, train

# fp32 rounds by 6e-8; sums in another order, carried on by a step of Adam (see test_matrix).
FP32 = 1e-5
OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "dp2": (2, OVERLAPPED),
    "ep2 dp2": (4, {**OVERLAPPED, **EP2}),
}
# Four data-parallel ranks have a sequence each.
TRAINING = {"micro_batch_size": 1}


def train_in_small_buckets(raw, steps):
    """`train` with a bucket for each parameter."""
    from moepp_megatron.runtime.patches import replaced
    from moepp_megatron.training import setup

    small = partial(setup.DistributedDataParallelConfig, bucket_size=1)
    with replaced(setup, DistributedDataParallelConfig=small):
        return train(raw, steps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_parameter_is_read_before_it_is_gathered(trained, alone, layout):
    world_size, parallel = LAYOUTS[layout]
    raw = short(parallel=parallel, training=TRAINING)
    run = trained(world_size, raw, how=train_in_small_buckets)
    compare(run, alone(short(training=TRAINING)), FP32)
