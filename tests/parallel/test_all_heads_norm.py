"""Norms of queries and keys over all heads are torch's, however heads are shared out."""

import pytest

from tests.parallel.training_runs import (
    begin,
    settings,
)


def norm_beside_torch(num_heads, dtype):
    """Largest errors of this rank's output, of all inputs' gradients and of the weight's."""
    import torch
    import torch.distributed as dist

    from moepp_megatron.model.all_heads_norm import AllHeadsRMSNorm
    from moepp_megatron.model.megatron_config import transformer_config

    size, rank = dist.get_world_size(), dist.get_rank()
    parallel = {"tensor_model_parallel_size": size, "sequence_parallel": size > 1}
    config, _ = begin(settings(parallel=parallel, precision={"dtype": dtype}))
    megatron = transformer_config(config)
    torch.manual_seed(3)
    norm = AllHeadsRMSNorm(megatron, 6, eps=0.1, num_heads=num_heads)
    whole = torch.randn(5, 2, num_heads, 6).to(norm.weight.dtype).requires_grad_()
    norm.weight.data.copy_(torch.randn(num_heads * 6))
    weight = norm.weight.detach().clone().requires_grad_()
    # What each rank's part of the output is weighed with in the loss.
    held = max(num_heads // size, 1)
    grads = torch.randn(size, 5, 2, held, 6).to(whole.dtype)
    firsts = [index * num_heads // size for index in range(size)]

    flat = whole.float().flatten(-2)
    expected = torch.nn.functional.rms_norm(flat, flat.shape[-1:], weight.float(), 0.1)
    expected = expected.view(whole.shape)
    parts = [expected[:, :, first : first + held] for first in firsts]
    sum((part * grad).sum() for part, grad in zip(parts, grads, strict=True)).backward()

    own = whole.detach()[:, :, firsts[rank] : firsts[rank] + held].clone().requires_grad_()
    output = norm(own)
    output.backward(grads[rank])
    found, found_weight = torch.zeros_like(whole).float(), norm.weight.grad.float()
    found[:, :, firsts[rank] : firsts[rank] + held] = own.grad
    dist.all_reduce(found)
    dist.all_reduce(found_weight)
    assert output.dtype == whole.dtype
    pairs = ((output, parts[rank]), (found, whole.grad), (found_weight, weight.grad))
    error, error_x, error_weight = (
        float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs
    )
    return error, error_x, error_weight


@pytest.mark.parametrize(("world_size", "num_heads"), [(1, 3), (2, 4), (4, 4), (4, 2), (4, 1)])
def test_it_is_torchs_norm_of_all_heads(ranks, world_size, num_heads):
    for errors in ranks(world_size).run(norm_beside_torch, num_heads, "fp32"):
        # Sums of at most 24 numbers in another order, each rounded by 6e-8.
        assert max(errors) < 2e-6, errors
    for errors in ranks(world_size).run(norm_beside_torch, num_heads, "bf16"):
        # bf16 rounds by 4e-3: the output once; gradients once on each of up to 4 ranks, and once
        # more by torch.
        assert errors[0] < 4e-3, errors
        assert max(errors) < 2e-2, errors
