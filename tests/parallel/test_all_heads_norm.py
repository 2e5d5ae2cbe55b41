"""Norms of queries and keys over all heads: torch's formula, the same training in any layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config import ConfigError, parse_config
from moepp_megatron.training.checkpoint.files import checkpoint_name
from tests.parallel.checkpoint_runs import train_between
from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import CP2, EP2, FULL, PP2, TP2, Run, compare, settings, short

# fp32 rounds by 6e-8; sums in another order, carried on by steps of Adam (see test_matrix).
FP32 = 1e-5
ALL_HEADS: dict[str, Any] = {"qk_layernorm": True, "qk_layernorm_scope": "all_heads"}
MODELS: dict[str, dict[str, Any]] = {
    "two key heads": ALL_HEADS | {"num_query_groups": 2},
    "one key head": ALL_HEADS | {"num_query_groups": 1},
}
# Adam's first step divides each gradient by its own size, so that one which is rounding alone moves
# a weight as far as any other: of four sequences with one key head first gradients are 2e-6 apart,
# and the second step's balance loss 4e-5.
BATCH = {"two key heads": 4, "one key head": 8}
LAYOUTS: dict[str, tuple[str, int, dict[str, dict[str, Any]]]] = {
    "tp2, layers again": ("two key heads", 2, {"parallel": TP2, "training": FULL}),
    "tp2, a shared key head": ("one key head", 2, {"parallel": TP2}),
    "tp4, shared key heads": (
        "two key heads",
        4,
        {"parallel": TP2 | {"tensor_model_parallel_size": 4}},
    ),
    "pp2": ("two key heads", 2, {"parallel": PP2}),
    "cp2": ("two key heads", 2, {"parallel": CP2}),
    "tp2 ep2 dp2": ("two key heads", 4, {"parallel": TP2 | EP2}),
}


def vary_norms(chunks: list[Any]) -> None:
    """Weights of which each is different: at 1, as they begin, another head's would do as well."""
    import torch

    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "q_layernorm" in name or "k_layernorm" in name:
                steps = torch.arange(parameter.numel(), dtype=parameter.dtype)
                parameter.data.copy_(1.0 + 0.5 * torch.sin(1.0 + steps))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(trained, alone: Callable[..., Run], layout: str) -> None:
    name, world_size, sections = LAYOUTS[layout]
    model = MODELS[name] | sections.get("model", {})
    training = {"global_batch_size": BATCH[name]}
    raw = short(
        model=model, parallel=sections["parallel"], training=training | sections.get("training", {})
    )
    run = trained(world_size, raw, prepare=vary_norms)
    norms = {key: value.shape for key, value in run.gradients.items() if "k_layernorm" in key}
    # Heads are 8 channels wide.
    assert list(norms.values()) == [(model["num_query_groups"] * 8,)] * 2, norms
    compare(run, alone(short(model=MODELS[name], training=training), vary_norms), FP32)


def test_checkpoints_go_on_in_another_layout(ranks, alone: Callable[..., Run], tmp_path) -> None:
    model = MODELS["two key heads"]
    losses = ranks(2).run(train_between, short(model=model, parallel=TP2), tmp_path, 1)[0]
    start = tmp_path / checkpoint_name(1)
    # Two steps: the second loss follows from the weights and the optimizer's state.
    losses += ranks(1).run(train_between, short(model=model), tmp_path, 3, start)[0]
    np.testing.assert_allclose(losses, alone(short(model=model), steps=3).losses, rtol=FP32)


def test_a_checkpoint_with_norms_per_head_is_refused(tmp_path: Path) -> None:
    from moepp_megatron.training.checkpoint.compatible import check_compatible

    saved = parse_config(settings(model={"qk_layernorm": True}))
    (tmp_path / "config.yaml").write_text(saved.to_yaml())
    with pytest.raises(ConfigError, match=r"model\.qk_layernorm_scope \('all_heads'\)"):
        check_compatible(tmp_path, parse_config(settings(model=ALL_HEADS)))


def norm_beside_torch(num_heads: int, dtype: str) -> tuple[float, float, float]:
    """Largest errors of this rank's output, of all inputs' gradients and of the weight's."""
    import torch
    import torch.distributed as dist

    from moepp_megatron.config import Layout
    from moepp_megatron.model.all_heads_norm import AllHeadsRMSNorm
    from moepp_megatron.model.megatron_config import transformer_config
    from moepp_megatron.runtime.distributed import build_groups

    size, rank = dist.get_world_size(), dist.get_rank()
    parallel = {"tensor_model_parallel_size": size, "sequence_parallel": size > 1}
    config = parse_config(settings(parallel=parallel, precision={"dtype": dtype}))
    build_groups(config, Layout.from_config(config, size))
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
def test_it_is_torchs_norm_of_all_heads(ranks: RankPools, world_size: int, num_heads: int) -> None:
    for errors in ranks(world_size).run(norm_beside_torch, num_heads, "fp32"):
        # Sums of at most 24 numbers in another order, each rounded by 6e-8.
        assert max(errors) < 2e-6, errors
    for errors in ranks(world_size).run(norm_beside_torch, num_heads, "bf16"):
        # bf16 rounds by 4e-3: the output once; gradients once on each of up to 4 ranks, and once
        # more by torch.
        assert errors[0] < 4e-3, errors
        assert max(errors) < 2e-2, errors
