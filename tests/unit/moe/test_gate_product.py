"""The gate's product by blocks of tokens against megatron-core's of all at once."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from torch import Tensor

from moepp_megatron.moe.gate_product import gate_product

HIDDEN, COLUMNS = 48, 6


def _outcome(product, shape, dtype):
    """Result, and gradients of hidden states and weight."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(*shape, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(COLUMNS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    output = product(tokens, weight)
    output.backward(torch.randn(output.shape, generator=generator))
    return [output.detach(), tokens.grad, weight.grad]


@pytest.mark.parametrize("shape", [(1, 1), (1024, 1), (1025,), (1500, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_equals_the_product_of_all_tokens(shape, dtype):
    def whole(tokens, weight):
        return router_gating_linear(tokens, weight, None, torch.float32)

    ours, theirs = _outcome(gate_product, shape, dtype), _outcome(whole, shape, dtype)
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype is expected.dtype
        # Sums of products may differ in the last digits of fp32, and then be rounded otherwise.
        rounding = torch.finfo(expected.dtype).eps
        bound = 2e-6 + rounding * expected.float().abs()
        assert bool(((actual.float() - expected.float()).abs() <= bound * 4).all())


def test_no_token_at_all():
    """megatron-core's product refuses that."""
    output, token_grad, weight_grad = _outcome(gate_product, (0, 1), torch.bfloat16)
    assert output.shape == (0, 1, COLUMNS)
    assert token_grad.shape == (0, 1, HIDDEN)
    assert not weight_grad.any()


def test_a_sequence_that_is_not_contiguous():
    """Nor is the gradient of the result, which megatron-core's product refuses."""
    tokens = torch.randn(3, 7, HIDDEN).bfloat16().transpose(0, 1).requires_grad_()
    weight = torch.randn(COLUMNS, HIDDEN).bfloat16().requires_grad_()
    grad = torch.randn(COLUMNS, 3, 7).permute(2, 1, 0)
    output = gate_product(tokens, weight)
    ours = [output, *torch.autograd.grad(output, (tokens, weight), grad)]
    output = tokens.float() @ weight.float().T
    theirs = [output, *torch.autograd.grad(output, (tokens, weight), grad)]
    torch.testing.assert_close(ours, theirs)


def test_no_tensor_in_fp32_is_kept_or_as_large_as_the_tokens():
    """Neither the copy of the hidden states that the product reads nor their gradient."""
    largest = []

    class Widths(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype is torch.float32:
                largest.append(result.numel())
            return result

    tokens = torch.randn(5000, HIDDEN).bfloat16().requires_grad_()
    weight = torch.randn(COLUMNS, HIDDEN).bfloat16().requires_grad_()
    with Widths():
        gate_product(tokens, weight).sum().backward()
    assert max(largest) < tokens.numel() / 4
