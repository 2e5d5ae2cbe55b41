"""The gradient norm in one read against megatron-core's, and where it takes its place."""

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm

from moepp_megatron.training.setup import _l2_norm, _replace_l2_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_norm_of_all_tensors_together(dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 3), (1,), (64,), (2, 2, 2)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    norm, per_tensor = _l2_norm(1, torch.zeros(1), [tensors[:3], tensors[3:]], False)
    assert per_tensor is None
    assert (norm.shape, norm.dtype) == ((1,), torch.float32)
    exact = torch.cat([tensor.flatten().double() for tensor in tensors]).norm()
    # A bf16 tensor's own norm is rounded to bf16, as megatron-core's.
    tolerance = 1e-6 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(norm[0].double(), exact, rtol=tolerance, atol=0.0)


def test_cpus_keep_megatron_cores(monkeypatch):
    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    _replace_l2_norm()
    assert clip_grads.l2_norm_impl is local_multi_tensor_l2_norm
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _replace_l2_norm()
    assert clip_grads.l2_norm_impl is _l2_norm
    kernel = object()
    monkeypatch.setattr(clip_grads, "l2_norm_impl", kernel)
    _replace_l2_norm()
    assert clip_grads.l2_norm_impl is kernel
