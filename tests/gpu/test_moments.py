"""Adam's moments in bf16 with Transformer Engine's FusedAdam itself."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("transformer_engine")]


def test_a_step_moves_weights_by_moments_before_they_are_rounded():
    # Not before: they import Transformer Engine.
    from tests.te_stand_in.test_moments import BF16_MOMENTS, states, trained

    plain, bf16 = states(trained(1)), states(trained(1, optimizer=BF16_MOMENTS))
    for name, expected in plain.items():
        # fp32 in two kernels.
        torch.testing.assert_close(bf16[name]["param"], expected["param"], rtol=1e-6, atol=1e-7)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert bf16[name][moment].dtype is torch.bfloat16
            # One rounding to 8 bits.
            found = bf16[name][moment].float()
            torch.testing.assert_close(found, expected[moment], rtol=2**-8, atol=0)


def test_a_checkpoint_brings_back_every_bit(tmp_path):
    from tests.te_stand_in.test_moments import (
        BF16_MOMENTS,
        assert_equal,
        save_and_load,
        states,
        trained,
    )

    first, second = (trained(steps, optimizer=BF16_MOMENTS) for steps in (2, 0))
    save_and_load(tmp_path, first, second)
    assert_equal(states(second), states(first))
