"""`precision.grad_reduce_in_fp32: false`: gradients are summed in bf16, with what that costs."""

import numpy as np

from tests.parallel.training_runs import EP2, begin_training, short

# Each gradient is summed over 2 micro-batches and 2 ranks; bf16 keeps 8 bits, so each of the four
# sums rounds by at most 2^-9, and the norm of many of them by much less than their sum.
BF16 = 4 * 2.0**-9


def buffer_types(raw):
    _, _, model = begin_training(raw)
    return {str(p.main_grad.dtype) for chunk in model.models for p in chunk.parameters()}


def raw(in_fp32):
    precision = {"dtype": "bf16", "grad_reduce_in_fp32": in_fp32}
    # Two micro-batches on either rank.
    return short(precision=precision, parallel=EP2, training={"micro_batch_size": 1})


def test_gradients_are_summed_in_bf16(ranks, trained):
    assert ranks(2).run(buffer_types, raw(True)) == [{"torch.float32"}] * 2
    assert ranks(2).run(buffer_types, raw(False)) == [{"torch.bfloat16"}] * 2
    exact, rounded = (trained(2, raw(in_fp32)) for in_fp32 in (True, False))
    assert rounded.losses[0] == exact.losses[0], "the forward pass is the same"
    np.testing.assert_allclose(rounded.grad_norms[0], exact.grad_norms[0], rtol=BF16)
    assert rounded.grad_norms[0] != exact.grad_norms[0]
    for key, gradient in exact.gradients.items():
        error = np.linalg.norm(rounded.gradients[key] - gradient)
        assert error <= BF16 * np.linalg.norm(gradient), key
