"""The fused cross entropy over a shared vocabulary, alone and in training."""

import numpy as np
import pytest

from tests.parallel.training_runs import PP2, TP2, compare, short

TOKENS, COLUMNS = 6, 20
# As in tests/unit/moe/test_kernels.py: a dozen fp32 operations.
FP32 = 5e-6
# As in test_training_layouts.py: another layout adds up in another order.
LAYOUT = 1e-5


def losses_of_shares(spread):
    """Loss and gradient of this rank's columns: the kernels', megatron-core's, and in fp64."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from moepp_megatron.moe.kernels.cross_entropy import cross_entropy

    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(5)
    logits = (torch.randn(TOKENS, 1, size * COLUMNS) * spread).requires_grad_()
    labels = torch.arange(TOKENS).unsqueeze(1) * (size * COLUMNS - 1) // (TOKENS - 1)
    grad = torch.rand(TOKENS, 1)
    grad[2] = 0.0
    whole = logits.double().detach().requires_grad_()
    loss = F.cross_entropy(whole.flatten(0, 1), labels.flatten(), reduction="none").view_as(grad)
    loss.backward(grad.double())
    own = slice(rank * COLUMNS, (rank + 1) * COLUMNS)
    found = {"fp64": (loss.detach().numpy(), whole.grad[..., own].numpy())}
    for name, compute in (
        ("fused", lambda share: cross_entropy(share, labels, group)),
        (
            "megatron-core",
            lambda share: vocab_parallel_cross_entropy(share, labels, tp_group=group),
        ),
    ):
        share = logits[..., own].detach().clone().requires_grad_()
        loss = compute(share * 1)
        loss.backward(grad)
        found[name] = (loss.detach().numpy(), share.grad.numpy())
    # An id of no rank: what megatron-core says, so that a mask has the same to do.
    beyond = torch.full_like(labels, size * COLUMNS)
    with torch.no_grad():
        share = logits[..., own].clone()
        found["beyond"] = (
            cross_entropy(share, beyond, group).numpy(),
            vocab_parallel_cross_entropy(share.clone(), beyond, tp_group=group).numpy(),
        )
    return found


@pytest.mark.parametrize("spread", [3.0, 1e4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_of_the_vocabulary(ranks, size, spread):
    results = ranks(size).run(losses_of_shares, spread)
    for result in results:
        for name in ("fused", "megatron-core"):
            for actual, expected in zip(result[name], result["fp64"], strict=True):
                np.testing.assert_allclose(actual, expected, rtol=FP32, atol=FP32)
        np.testing.assert_array_equal(result["fused"][0], results[0]["fused"][0])
        np.testing.assert_allclose(*result["beyond"], rtol=FP32, atol=FP32)
    assert np.abs(results[0]["fp64"][1]).max() > 0


@pytest.fixture
def run(trained):
    def run_with(size, kind, **sections):
        precision = {"cross_entropy": kind, **sections.pop("precision", {})}
        return trained(size, short(**sections, precision=precision))

    return run_with


@pytest.mark.parametrize(
    ("size", "sections"),
    [(2, {"model": {"tie_embeddings": True}, "parallel": TP2}), (2, {"parallel": PP2})],
    ids=["tp2 tied", "pp2"],
)
def test_training(run, size, sections):
    """Losses, gradients and routing are those of megatron-core's cross entropy in the layout."""
    unfused, fused = (run(size, kind, **sections) for kind in ("unfused", "fused"))
    compare(fused, unfused, LAYOUT)
    assert any(
        not np.array_equal(fused.gradients[name], unfused.gradients[name])
        for name in unfused.gradients
    ), "the kernels did not run"


def test_the_native_fusion_is_exact_where_logits_are_bf16(run):
    """It rounds the gradient to bf16, which autograd does with megatron-core's other one too."""
    bf16 = {"dtype": "bf16"}
    unfused, native = (run(1, kind, precision=bf16) for kind in ("unfused", "native"))
    compare(native, unfused, 0.0)


def test_a_cpu_keeps_what_it_computed(run):
    unfused, auto = (run(1, kind) for kind in ("unfused", "auto"))
    compare(auto, unfused, 0.0)
