"""The fused cross entropy against PyTorch in fp64, on one rank: compiled where there is a GPU."""

import pytest
import torch
import torch.nn.functional as F

from tests.unit.moe.test_kernels import BF16, DEVICE, FP32, compiled  # noqa: F401

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# (tokens, columns, spread of the logits): blocks hold 16 columns here.
CASES = [
    (7, 50, 3.0),
    (1, 33, 1.0),
    (5, 16, 1.0),
    (3, 5, 1.0),
    (2, 1, 1.0),
    (4, 40, 1e4),
    (4, 40, 1e-6),
]


@pytest.fixture(autouse=True)
def small_blocks(compiled, monkeypatch):  # noqa: F811
    from moepp_megatron.moe.kernels import cross_entropy

    monkeypatch.setattr(cross_entropy, "_BLOCK", 16)


def case(tokens, columns, spread, dtype):
    """Logits [s, 1, V], labels of which the first and last columns are among, gradient [s, 1]."""
    logits = (torch.randn(tokens, 1, columns, device=DEVICE) * spread).to(dtype)
    labels = torch.randint(columns, (tokens, 1), device=DEVICE)
    labels[0], labels[-1] = 0, columns - 1
    # The second token is masked.
    grad = torch.rand(tokens, 1, device=DEVICE)
    grad[1:2] = 0.0
    return logits, labels, grad


def in_fp64(logits, labels, grad):
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="none")
    loss.backward(grad.double().flatten())
    return loss.detach().view(labels.shape), leaf.grad


@DTYPES
@pytest.mark.parametrize(("tokens", "columns", "spread"), CASES)
def test_loss_and_gradient(compiled, dtype, tokens, columns, spread):  # noqa: F811
    logits, labels, grad = case(tokens, columns, spread, dtype)
    expected, expected_grad = in_fp64(logits, labels, grad)
    leaf = logits.clone().requires_grad_()
    loss = compiled.cross_entropy(leaf, labels, None)
    loss.backward(grad)
    assert loss.dtype == torch.float32
    # The logit of the label and the largest one are fp32, their difference is rounded once.
    torch.testing.assert_close(loss.double(), expected, rtol=FP32, atol=FP32)
    # A share of one: 1 - p loses what p has below 6e-8.
    rtol, atol = (BF16, 2**-24) if dtype is torch.bfloat16 else (FP32, 5e-7)
    torch.testing.assert_close(leaf.grad.double(), expected_grad, rtol=rtol, atol=atol)
    assert leaf.grad[1:2].abs().sum() == 0, "a masked token"


@DTYPES
def test_same_as_megatron_core(compiled, dtype):  # noqa: F811
    """Labels of no column too, as masked tokens may have."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits, labels, grad = case(6, 50, 3.0, dtype)
    labels[2], labels[3] = -100, 50
    ones, others = (logits.clone().requires_grad_() for _ in range(2))
    ours = compiled.cross_entropy(ones * 1, labels, dist.group.WORLD)
    theirs = vocab_parallel_cross_entropy(others * 1, labels, tp_group=dist.group.WORLD)
    torch.testing.assert_close(ours, theirs, rtol=FP32, atol=FP32)
    ours.backward(grad)
    theirs.backward(grad)
    rtol = BF16 if dtype is torch.bfloat16 else FP32
    torch.testing.assert_close(ones.grad, others.grad, rtol=rtol, atol=5e-7)


def test_no_memory_beside_the_logits(compiled):  # noqa: F811
    """Nothing of their size is kept between the passes, and the gradient is in their place."""
    logits, labels, grad = case(6, 50, 1.0, torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    product, kept, arrived = leaf * 1, [], []
    product.register_hook(arrived.append)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = compiled.cross_entropy(product, labels, None)
    large = [t for t in kept if t.numel() > 3 * labels.numel()]
    assert [t.data_ptr() for t in large] == [product.data_ptr()]
    loss.backward(grad)
    assert arrived[0].data_ptr() == product.data_ptr()
    assert arrived[0].dtype == torch.bfloat16


def test_whoever_needs_the_logits_after_their_gradient_is_reported(compiled):  # noqa: F811
    logits, labels, grad = case(4, 20, 1.0, torch.float32)
    product = logits.requires_grad_() * 1
    other = product.square().sum()
    loss = compiled.cross_entropy(product, labels, None)
    loss.backward(grad, retain_graph=True)
    for late in (loss.sum(), other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()


def test_numbers_that_are_none(compiled):  # noqa: F811
    """NaN and infinity reach the loss, whose guard refuses them; excluded columns count nothing."""
    logits, labels, _ = case(5, 50, 1.0, torch.float32)
    labels.fill_(40)
    logits[0, 0, 3], logits[1, 0, 3] = float("nan"), float("inf")
    # A whole block, and all but the label's column.
    logits[2, 0, :16] = float("-inf")
    logits[3, 0, :40] = logits[3, 0, 41:] = float("-inf")
    loss = compiled.cross_entropy(logits, labels, None)
    assert loss[:2].isnan().all()
    expected = F.cross_entropy(logits[2].double(), labels[2]).float()
    torch.testing.assert_close(loss[2, 0], expected, rtol=FP32, atol=FP32)
    assert loss[3] == 0
    assert loss[4].isfinite()


def test_no_tokens(compiled):  # noqa: F811
    logits = torch.zeros(0, 2, 8, device=DEVICE, requires_grad=True)
    labels = torch.zeros(0, 2, dtype=torch.long, device=DEVICE)
    loss = compiled.cross_entropy(logits, labels, None)
    loss.sum().backward()
    assert loss.shape == (0, 2)
    assert logits.grad.shape == logits.shape
