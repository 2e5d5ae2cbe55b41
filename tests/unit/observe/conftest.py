"""Records to write."""

import pytest

from moepp_megatron.observe.metrics import StepMetrics


@pytest.fixture
def make_record():
    """Builds a record of one step of a layer with 2 FFN and 2 zero-computation experts."""

    def make(step=1, **changes):
        values = {
            "step": step,
            "tokens": 512 * step,
            "loss": 5.25,
            "lr": 3e-4,
            "grad_norm": 1.5,
            "step_time_s": 0.5,
            "tokens_per_s": 1024.0,
            "balance_loss": 1.0,
            "ffn_fraction": 0.625,
            "ffn_per_token": 1.25,
            "expert_share": [0.3125, 0.3125, 0.25, 0.125],
            "max_ffn_load": 1.0,
            "dropped_fraction": 0.0,
            "a2a_bytes": 4096,
        }
        return StepMetrics(**(values | changes))

    return make
